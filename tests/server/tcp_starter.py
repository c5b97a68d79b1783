"""Starts worker processes that connect back over TCP, as those on a cluster do, on this machine and without Ray."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from dash_server.worker.listener import WorkerListener
from dash_server.worker.ray_actor import WorkerActor
from dash_server.worker.remote_worker import RemoteProcess, RemoteWorker


class TcpStarter:
    """A `WorkerStarter`. The listener is there from the first start on."""

    def __init__(self, arguments: Sequence[str], certificate: tuple[Path, Path] | None = None) -> None:
        self._arguments = arguments
        self._certificate = certificate
        self.listener: WorkerListener | None = None

    async def start(self, tell: Callable[[str], None]) -> RemoteWorker:
        if self.listener is None:
            self.listener = WorkerListener("127.0.0.1", 0, self._certificate)
        with self.listener.expect() as expected:
            credentials = msgspec.msgpack.encode(expected.credentials)
            actor = WorkerActor([*self._arguments, "--connect", self.listener.address], {}, credentials)
            pid, node = actor.place()
            process = RemoteProcess(f"worker {pid} on {node}")
            waiting = asyncio.ensure_future(asyncio.to_thread(actor.wait))
            waiting.add_done_callback(lambda done: process.ended.set_result(f"status {done.result()}"))

            def kill() -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

            return RemoteWorker(await expected.connection, process, kill)

    async def close(self) -> None:
        if self.listener is not None:
            await self.listener.close()
