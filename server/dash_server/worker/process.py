"""Starts one process by exec on this machine, talks to it over a socket pair, and never leaves it behind.

Knows no requests and no restarts. On Linux the kernel ends the process with the server; elsewhere it exits when its end
of the socket closes. The compilers that a worker starts are in its process group and end with it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Generic

from dash_runtime.child_process import LARGE_PAGES
from dash_server.worker.connection import FramedConnection, Received
from dash_server.worker.messages import FromWorker, Shutdown, decode_from_worker
from dash_server.worker.starter import to_its_end

logger = logging.getLogger(__name__)

_SECONDS_PER_STAGE = 2.0
_MEANINGS = {-signal.SIGBUS: ": a file of its weights shrank while it was mapped"}
# Time to read a dead worker's last messages; a grandchild may hold its socket open for ever.
_LAST_WORDS_SECONDS = 0.5


class LocalStarter:
    """A `WorkerStarter` of processes on this machine."""

    def __init__(self, command: Sequence[str]) -> None:
        """Runs `command` with `--fd N` appended; N is the worker's end of the socket."""
        self._command = command
        self._begun: FramedProcess[FromWorker] | None = None

    async def begin(self) -> None:
        """Starts the process that the first `start` returns: it imports torch while its server comes up."""
        self._begun = await self._spawn()

    async def start(self, tell: Callable[[str], None]) -> "FramedProcess[FromWorker]":
        begun, self._begun = self._begun, None
        return begun or await self._spawn()

    async def close(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.kill()
            await begun.stop()

    async def _spawn(self) -> "FramedProcess[FromWorker]":
        return await FramedProcess.spawn(self._command, decode_from_worker, LARGE_PAGES)


class FramedProcess(Generic[Received]):
    """A running process on this machine that sends `Received` messages. One of a worker is a `Worker`."""

    def __init__(self, process: asyncio.subprocess.Process, connection: FramedConnection[Received]) -> None:
        self._process = process
        self._connection = connection
        self._exit_watch = asyncio.create_task(self._close_after_exit())

    @classmethod
    async def spawn(
        cls, command: Sequence[str], decode: Callable[[bytes], Received], usual: Mapping[str, str] | None = None
    ) -> "FramedProcess[Received]":
        """Runs `command` with `--fd N` appended, and with the environment of this process. Where that lacks a variable
        that is `usual`, the command has it."""
        ours, theirs = socket.socketpair()
        with theirs:
            # No await after the process starts: a cancellation there would leave the process behind.
            transport, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
            connection = FramedConnection(transport, decode)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    env={**(usual or {}), **os.environ},
                    stdin=asyncio.subprocess.DEVNULL,
                    # A process group of its own. A terminal's Ctrl-C goes to a whole group, but the worker must survive
                    # it for the drain. And the group's compilers can be ended with the worker.
                    start_new_session=True,
                )
            except BaseException:
                connection.close()
                raise
        return cls(process, connection)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def name(self) -> str:
        return f"worker {self.pid}"

    def send(self, message: object) -> None:
        self._connection.send(message)

    def messages(self) -> AsyncGenerator[Received, None]:
        return self._connection.messages()

    async def deliver(self, receive: Callable[[Received], None]) -> None:
        await self._connection.deliver(receive)

    async def stop(self) -> str:
        """Asks the process to exit, then sends SIGTERM, then SIGKILL. See `Worker`."""
        status = await to_its_end(self._end())
        return f"status {status}{_MEANINGS.get(status, '')}"

    async def _end(self) -> int:
        self.send(Shutdown())
        self._connection.close()
        for stop_signal in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _SECONDS_PER_STAGE)
                break
            logger.warning("the worker does not exit; sending %s", stop_signal.name)
            self._signal(stop_signal)
        status = await self._process.wait()
        self._exit_watch.cancel()
        await asyncio.wait([self._exit_watch])
        self._connection.abort()
        return status

    def kill(self) -> None:
        """Kills the process without waiting."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """Signals the worker and all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _close_after_exit(self) -> None:
        await self._process.wait()
        self._signal(signal.SIGKILL)
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self._connection.close()
