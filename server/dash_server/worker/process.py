"""Starts one worker process by exec, talks to it in framed messages, and never leaves it behind.

Knows no requests and no restarts. On Linux the kernel ends the worker with the server; elsewhere the worker exits when
its end of the socket closes. The compilers that it starts are in its process group and end with it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, Sequence

import msgspec

from dash_server.worker.messages import (
    FrameReader,
    FromWorker,
    Shutdown,
    ToWorker,
    decode_from_worker,
    encode_frame,
)

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_SECONDS_PER_STAGE = 2.0
# Time to read a dead worker's last messages; a grandchild may hold its socket open for ever.
_LAST_WORDS_SECONDS = 0.5


class WorkerProcess:
    """A running worker."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._exit_watch = asyncio.create_task(self._close_after_exit())

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> "WorkerProcess":
        """Runs `command` with `--fd N` appended; N is the worker's end of the socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            # No await after the process starts: a cancellation there would leave the process behind.
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    # A process group of its own. A terminal's Ctrl-C goes to a whole group, but the worker must survive
                    # it for the drain. And the group's compilers can be ended with the worker.
                    start_new_session=True,
                )
            except BaseException:
                writer.close()
                raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Sends in order, without waiting. Does nothing if the worker is dead."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def messages(self) -> AsyncGenerator[FromWorker, None]:
        """Yields the worker's messages until it dies or sends one that cannot be decoded."""
        frames = FrameReader()
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
                bodies = frames.feed(data)
                received = [decode_from_worker(body) for body in bodies]
            except ConnectionError:
                return
            except (ValueError, msgspec.MsgspecError):
                logger.exception("the worker sent a message that cannot be understood")
                return
            if not data:
                return
            for message in received:
                yield message

    async def stop(self) -> int:
        """Asks the process to exit, then sends SIGTERM, then SIGKILL. Returns the exit status.

        A cancellation meanwhile still waits for the end: no process is left behind.
        """
        ending = asyncio.create_task(self._end())
        try:
            return await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise

    async def _end(self) -> int:
        self.send(Shutdown())
        self._writer.close()
        for stop_signal in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _SECONDS_PER_STAGE)
                break
            logger.warning("the worker does not exit; sending %s", stop_signal.name)
            self._signal(stop_signal)
        status = await self._process.wait()
        self._exit_watch.cancel()
        await asyncio.wait([self._exit_watch])
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
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
        self._writer.close()
