"""The server's end of a connection to another process: framed messages over a pair of streams.

Knows no processes: whoever started one ends it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

import msgspec

from dash_server.worker.messages import FrameReader, encode_frame

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024

Received = TypeVar("Received")


class FramedConnection(Generic[Received]):
    """A connection over which `Received` messages come."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decode: Callable[[bytes], Received]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = decode

    def send(self, message: object) -> None:
        """Sends in order, without waiting. Does nothing if the connection is closed."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def messages(self) -> AsyncGenerator[Received, None]:
        """Yields messages until the connection ends or one cannot be decoded."""
        frames = FrameReader()
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
                bodies = frames.feed(data)
                received = [self._decode(body) for body in bodies]
            except OSError:
                return
            except (ValueError, msgspec.MsgspecError):
                logger.exception("a worker sent a message that cannot be understood")
                return
            if not data:
                return
            for message in received:
                yield message

    def close(self) -> None:
        """Closes the connection when all is sent."""
        self._writer.close()

    def abort(self) -> None:
        """Closes the connection at once. `messages` ends."""
        self._writer.transport.abort()
