"""The worker process, started by exec as `python -m dash_server.worker`. Does not know its starter.

`--fd N` is a socket to the server. With `--connect HOST:PORT` the worker opens one, and reads the credentials for it
from its standard input, where no other process sees them.
"""

import argparse
import gc
import logging
import os
import signal
import socket
import sys

import msgspec

from dash_runtime.child_process import die_with_parent
from dash_server.logs import configure_worker_logging
from dash_server.worker.handshake import Credentials, HandshakeError
from dash_server.worker.server_socket import connect

logger = logging.getLogger("dash_server.worker")

_SPINS = "2000"
"""Turns in which a thread of the library waits for another one before it sleeps: some tens of microseconds. libgomp's
300,000 take milliseconds, in which the processor may be the one that the other thread needs."""


def main(arguments: list[str] | None = None) -> int:
    """Serves the server at the other end of the socket; returns the exit code."""
    parser = argparse.ArgumentParser(description="A worker of dash-server; not for use by hand.")
    add_server_arguments(parser)
    given = parser.parse_args(arguments)
    die_with_parent()
    wait_briefly()
    configure_worker_logging()
    # A terminal sends Ctrl-C to the whole process group, but the server decides when its worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = open_server(given)
    except (HandshakeError, OSError) as error:
        logger.error("cannot connect to the server at %s: %s", given.connect, error)
        return 4
    # Imports torch, which takes seconds: the server need not wait for it to know its worker. The collector would walk
    # over the growing modules time and again, a tenth of these seconds, and find little; later it is spared them.
    gc.disable()
    from dash_server.worker.engine_loop import EngineLoop

    gc.freeze()
    gc.enable()
    return EngineLoop(server).run()


def wait_briefly() -> None:
    """Has threads that wait for each other go to sleep soon, unless the user said how they wait.

    Prompts run the library's products, hundreds of short ones. Beside a busy process each would take as long as the
    system lets that run. libgomp reads the variable when torch is imported.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two ways to the server, of which one must be given."""
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--fd", type=int, help="file descriptor of the socket to the server")
    ways.add_argument("--connect", metavar="HOST:PORT", help="the server's address; credentials come on stdin")


def open_server(arguments: argparse.Namespace) -> socket.socket:
    """Returns the socket to the server. Raises as `connect` does."""
    if arguments.fd is not None:
        return socket.socket(fileno=arguments.fd)
    credentials = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Credentials)
    host, _, port = arguments.connect.rpartition(":")
    return connect(host.strip("[]"), int(port), credentials)


if __name__ == "__main__":
    sys.exit(main())
