"""Runs a server from its start to its end, and says by an exit code how it ended."""

import asyncio
import os
import sys
from functools import partial

from dash_runtime.errors import DashRuntimeError
from dash_server.auth import TokenFileError
from dash_server.exits import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR, complain
from dash_server.listening import ListenError, raise_file_limit
from dash_server.loop_watch import watch_loop
from dash_server.server import DashServer
from dash_server.settings import Settings
from dash_server.stop_signals import StopSignals
from dash_server.worker.starter import WorkerStarter, WorkerStartError

_SWITCH_SECONDS = 0.001
"""After so long a thread that reads a long request lets the event loop go on, for whose turn streams wait."""


async def run_server(settings: Settings, starter: WorkerStarter, signals: StopSignals, *, only_prepares: bool) -> int:
    """Runs a server until a signal or a failure, or only prepares its start; returns the exit code."""
    try:
        raise_file_limit()
        sys.setswitchinterval(_SWITCH_SECONDS)
        server = DashServer(settings, starter)
        signals.at_the_second = server.kill_workers
        if not only_prepares:
            await server.start()
            watch_loop(asyncio.get_running_loop(), partial(_give_up, server))
    except (ListenError, TokenFileError) as error:
        return complain(str(error))
    stop = asyncio.create_task(signals.first())
    worker = asyncio.create_task(server.prepare() if only_prepares else server.run_workers())
    try:
        await asyncio.wait({worker, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            await server.drain(settings.shutdown_grace_seconds)
            return EXIT_FAILURE if only_prepares else EXIT_OK
        worker.result()
        return EXIT_OK
    except WorkerStartError as error:
        return complain(str(error), code=EXIT_USER_ERROR if error.is_for_user else EXIT_FAILURE)
    except DashRuntimeError as error:
        return complain(str(error))
    finally:
        await server.close()
        worker.cancel()
        await asyncio.wait([worker])
        stop.cancel()


def _give_up(server: DashServer) -> None:
    """Ends the process at once, from any thread."""
    server.kill_workers()
    os._exit(EXIT_FAILURE)
