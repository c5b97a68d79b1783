"""The server's end of a connection to another process: framed messages over a transport.

Knows no processes: whoever started one ends it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

import msgspec

from dash_server.worker.messages import FrameReader, encode_frame

logger = logging.getLogger(__name__)

Received = TypeVar("Received")


class FramedConnection(asyncio.Protocol, Generic[Received]):
    """A connection over which `Received` messages come."""

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        decode: Callable[[bytes], Received],
        writer: asyncio.StreamWriter | None = None,
    ) -> None:
        """Takes over a transport from which all that arrived has been read. Keeps its writer, which would close it."""
        self._transport = transport
        self._writer = writer
        self._decode = decode
        self._frames = FrameReader()
        self._received: deque[Received] = deque()
        self._receiver: Callable[[Received], None] = self._received.append
        self._change = asyncio.Event()
        self._is_over = transport.is_closing()
        transport.set_protocol(self)

    def send(self, message: object) -> None:
        """Sends in order, without waiting. Does nothing if the connection is closed."""
        if not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    async def messages(self) -> AsyncGenerator[Received, None]:
        """Yields messages until the connection ends or one cannot be decoded."""
        while True:
            while self._received:
                yield self._received.popleft()
            if self._is_over:
                return
            self._change.clear()
            await self._change.wait()

    async def deliver(self, receive: Callable[[Received], None]) -> None:
        """Calls `receive` with each message as soon as it arrives, which saves two turns of the event loop for each.

        Returns when `messages` would end. Nobody may wait in `messages` meanwhile.
        """
        while self._received:
            receive(self._received.popleft())
        self._receiver = receive
        while not self._is_over:
            self._change.clear()
            await self._change.wait()

    def data_received(self, data: bytes) -> None:
        """Takes what has arrived."""
        if self._is_over:
            return
        try:
            for body in self._frames.feed(data):
                self._receiver(self._decode(body))
        except (ValueError, msgspec.MsgspecError):
            logger.exception("a worker sent a message that cannot be understood")
            self._end()
            return
        if self._received:
            self._change.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Takes the end of the connection."""
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._change.set()

    def close(self) -> None:
        """Closes the connection when all is sent."""
        self._transport.close()

    def abort(self) -> None:
        """Closes the connection at once. `messages` ends."""
        self._transport.abort()
