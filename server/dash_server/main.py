"""The `dash-server` command: reads the settings, begins the first worker, and returns an exit code.

Exit codes: 0 after a drain, or when all is prepared; 2 if a changed setting can help; 1 otherwise. Imports no
torch, which only the worker does, and what answers calls only once the worker is begun.
"""

import asyncio
import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from dash_server.exits import complain
from dash_server.load_settings import SettingsError, load_settings, unknown_variables
from dash_server.logs import configure_logging
from dash_server.settings import Settings
from dash_server.stop_signals import StopSignals
from dash_server.worker.process import LocalStarter
from dash_server.worker.ray_start import RayPlaces, RayStarter
from dash_server.worker.starter import WorkerStarter

logger = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "dash_server.worker")

_DESCRIPTION = """Serves a model over gRPC until it is told to stop. Settings are environment variables, such as
DASH_MODEL and DASH_PORT; docs/settings.md has them all, and a start logs them."""
_PREPARE_HELP = """convert the model, compile native code and measure this machine, as the first start does, and exit:
later starts with these settings then take seconds"""


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
        return complain(*error.lines)
    configure_logging(settings.log_level, settings.log_format)
    for warning in unknown_variables(os.environ):
        logger.warning("%s", warning)
    if only_prepares:
        settings = settings.model_copy(update={"measure_first": True})
    logger.info("settings: %s", settings.loggable())
    return asyncio.run(_run(settings, worker_command, only_prepares=only_prepares))


async def _run(settings: Settings, worker_command: Sequence[str], *, only_prepares: bool) -> int:
    signals = StopSignals()
    starter = await _starter(settings, worker_command)
    try:
        # Imports grpc and all that answers calls, while the worker imports torch.
        from dash_server.running import run_server

        return await run_server(settings, starter, signals, only_prepares=only_prepares)
    finally:
        await starter.close()


async def _starter(settings: Settings, worker_command: Sequence[str]) -> WorkerStarter:
    """Returns what starts workers: processes of this machine, the first of which is begun, or of a Ray cluster."""
    if settings.ray_address is None:
        local = LocalStarter(worker_command)
        await local.begin()
        return local
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


if __name__ == "__main__":
    sys.exit(main())
