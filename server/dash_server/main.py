"""The `dash-server` command: reads the settings, handles signals and returns an exit code.

SIGTERM or SIGINT drains the server; a second one ends it at once. Exit codes: 0 after a drain, or when all is prepared;
2 if a changed setting can help; 1 otherwise. Imports no torch: only the worker does.
"""

import asyncio
import logging
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial

from dash_runtime.errors import DashRuntimeError
from dash_server.auth import TokenFileError
from dash_server.listening import ListenError, raise_file_limit
from dash_server.load_settings import SettingsError, load_settings, unknown_variables
from dash_server.logs import configure_logging
from dash_server.loop_watch import watch_loop
from dash_server.server import DashServer
from dash_server.settings import Settings
from dash_server.worker.process import LocalStarter
from dash_server.worker.ray_start import RayPlaces, RayStarter
from dash_server.worker.starter import WorkerStarter, WorkerStartError

logger = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "dash_server.worker")

_DESCRIPTION = """Serves a model over gRPC until it is told to stop. Settings are environment variables, such as
DASH_MODEL and DASH_PORT; docs/settings.md has them all, and a start logs them."""
_PREPARE_HELP = """convert the model, compile native code and measure this machine, as the first start does, and exit:
later starts with these settings then take seconds"""
_SWITCH_SECONDS = 0.001
"""After so long a thread that reads a long request lets the event loop go on, for whose turn streams wait."""
_EXIT_OK = 0
_EXIT_FAILURE = 1
_EXIT_USER_ERROR = 2


def main(worker_command: Sequence[str] = WORKER_COMMAND) -> int:
    """Runs the server until a signal or a failure, or only prepares its start; returns the exit code.

    Raises:
        SystemExit: the command line asked for help (0), or had an argument that does not exist (2).
    """
    parser = ArgumentParser("dash-server", description=_DESCRIPTION)
    parser.add_argument("--prepare", action="store_true", help=_PREPARE_HELP)
    only_prepares = parser.parse_args().prepare
    try:
        settings = load_settings()
    except SettingsError as error:
        return _complain(*error.lines)
    configure_logging(settings.log_level, settings.log_format)
    for warning in unknown_variables(os.environ):
        logger.warning("%s", warning)
    if only_prepares:
        settings = settings.model_copy(update={"measure_first": True})
    logger.info("settings: %s", settings.loggable())
    return asyncio.run(_run(settings, worker_command, only_prepares=only_prepares))


async def _run(settings: Settings, worker_command: Sequence[str], *, only_prepares: bool) -> int:
    try:
        raise_file_limit()
        sys.setswitchinterval(_SWITCH_SECONDS)
        server = DashServer(settings, _starter(settings, worker_command))
        stop = _stop_requested(server)
        if not only_prepares:
            await server.start()
            watch_loop(asyncio.get_running_loop(), partial(_give_up, server))
    except (ListenError, TokenFileError) as error:
        return _complain(str(error))
    worker = asyncio.create_task(server.prepare() if only_prepares else server.run_workers())
    try:
        await asyncio.wait({worker, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            await server.drain(settings.shutdown_grace_seconds)
            return _EXIT_FAILURE if only_prepares else _EXIT_OK
        worker.result()
        return _EXIT_OK
    except WorkerStartError as error:
        return _complain(str(error), code=_EXIT_USER_ERROR if error.is_for_user else _EXIT_FAILURE)
    except DashRuntimeError as error:
        return _complain(str(error))
    finally:
        await server.close()
        worker.cancel()
        await asyncio.wait([worker])
        stop.cancel()


def _starter(settings: Settings, worker_command: Sequence[str]) -> WorkerStarter:
    """Returns what starts workers: processes of this machine, or of a Ray cluster."""
    if settings.ray_address is None:
        return LocalStarter(worker_command)
    assert settings.num_threads is not None  # the settings refuse Ray without
    chain, key = settings.tls_certificate_file, settings.tls_key_file
    places = RayPlaces(
        address=settings.ray_address,
        num_cpus=settings.num_threads,
        num_gpus=sum(name.startswith("cuda") for name in settings.device_names),
        host=settings.worker_host,
        port=settings.worker_port,
        certificate=None if chain is None or key is None else (chain, key),
        allow_plaintext=settings.allow_plaintext,
    )
    _, *arguments = worker_command  # each node has a Python of its own
    return RayStarter(places, arguments, os.environ)


def _stop_requested(server: DashServer) -> asyncio.Task[bool]:
    """Returns a task that ends at the first SIGTERM or SIGINT; the second one exits the process."""
    requested = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if requested.is_set():
            server.kill_workers()
            os._exit(128 + number)
        logger.info("%s: shutting down; a second one ends the server at once", number.name)
        requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return asyncio.create_task(requested.wait())


def _give_up(server: DashServer) -> None:
    """Ends the process at once, from any thread."""
    server.kill_workers()
    os._exit(_EXIT_FAILURE)


def _complain(*lines: str, code: int = _EXIT_USER_ERROR) -> int:
    for line in lines:
        print(f"dash-server: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
