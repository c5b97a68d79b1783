"""The worker process, started by exec as `python -m dash_server.worker --fd N`. Does not know its starter."""

import argparse
import signal
import socket
import sys

from dash_runtime.child_process import die_with_parent
from dash_server.logs import configure_worker_logging
from dash_server.worker.engine_loop import EngineLoop


def main(arguments: list[str] | None = None) -> int:
    """Serves the server at the other end of the socket; returns the exit code."""
    parser = argparse.ArgumentParser(description="A worker of dash-server; not for use by hand.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the server")
    fd = parser.parse_args(arguments).fd
    die_with_parent()
    configure_worker_logging()
    # A terminal sends Ctrl-C to the whole process group, but the server decides when its worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return EngineLoop(socket.socket(fileno=fd)).run()


if __name__ == "__main__":
    sys.exit(main())
