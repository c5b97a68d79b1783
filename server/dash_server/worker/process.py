"""One worker process and the socket to it: started by exec, framed messages, never left behind.

Knows nothing of requests or restarts. The kernel ends the worker with the server, on Linux; elsewhere it exits by
itself when its end of the socket closes. What it started in turn (compilers, at a first start) is in its process group,
and ends with it.
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
# What a dead worker wrote last is read for this long; a grandchild may hold its socket open for ever.
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
        """Runs `command` with `--fd N` appended, N being the worker's end of the socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            # Nothing is awaited once the process is there: whoever is cancelled meanwhile would leave it behind.
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    # A group of its own: a Ctrl-C in a terminal goes to a whole group, but the worker must outlive the
                    # drain; and its compilers can be ended with it.
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
        """Sends, in order and without waiting. To a dead worker, sends nothing."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def messages(self) -> AsyncGenerator[FromWorker, None]:
        """All that the worker says, until it is gone or says what cannot be understood."""
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
        """Ends the process, by asking, then by SIGTERM, then by SIGKILL. Returns its exit status. Whoever is cancelled
        meanwhile still waits for it: no process is left behind."""
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
        """Ends the process at once, without waiting."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """To the worker and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _close_after_exit(self) -> None:
        await self._process.wait()
        self._signal(signal.SIGKILL)
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self._writer.close()
