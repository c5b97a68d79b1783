"""Receives the messages of calls: in turns, within a time, and within the memory that unfinished ones may take.

gRPC reads the message of a unary call whole before a handler can look at who calls. So to gRPC all our methods take
streams, which is the same on the wire, and this takes the one message of those that are unary. Knows callers and bytes;
knows no message's meaning.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import grpc

from dash_runtime.errors import InvalidRequest
from dash_server.statuses import MessageTooSlow
from dash_server.turns import Turns

_PATIENCE_SECONDS = 0.5
"""While others wait, a message that takes longer gives its place up. Nearly all arrive whole, with their call."""


class Call(Protocol):
    """A call of gRPC, of which a receiver reads messages."""

    async def read(self) -> object:
        """Returns the next message, or `grpc.aio.EOF`."""
        ...


class Receiver:
    """Receives at most `num_places` messages at once, each within `seconds`."""

    def __init__(self, num_places: int, seconds: float, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._turns = Turns(num_places)
        self._seconds = seconds
        self._patience_seconds = patience_seconds
        # By caller, the oldest first: when each message must have arrived.
        self._receiving: dict[str, dict[asyncio.Timeout, float]] = {}

    @asynccontextmanager
    async def message(self, call: Call, name: str) -> AsyncIterator[bytes]:
        """Yields the message of a call of this caller. It holds its place until the context ends, so that no more wait
        to be read than are received.

        Raises:
            MessageTooSlow: it does not arrive in time.
            QueueFull: too many wait for their turn to send one.
            InvalidRequest: the call has no message.
        """
        await self._take_turn(name)
        try:
            yield await self._receive(call, name)
        finally:
            self._turns.leave(name)

    async def _receive(self, call: Call, name: str) -> bytes:
        own = self._receiving.setdefault(name, {})
        timeout = asyncio.timeout(self._seconds)
        own[timeout] = asyncio.get_running_loop().time()
        try:
            async with timeout:
                data = await call.read()
        except TimeoutError:
            raise MessageTooSlow from None
        finally:
            own.pop(timeout, None)
            if not own and self._receiving.get(name) is own:
                del self._receiving[name]
        if not isinstance(data, bytes):
            assert data is grpc.aio.EOF
            raise InvalidRequest("request", "the call has no message")
        return data

    async def _take_turn(self, name: str) -> None:
        while not self._turns.take_now(name):  # most find a place free, and need no timer
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_seconds):
                    return await self._turns.take(name)
            self._end_a_slow_one()

    def _end_a_slow_one(self) -> None:
        """Ends the oldest reception of the caller with the most, if it takes long already."""
        own = max(self._receiving.values(), key=len, default=None)
        if own:
            timeout, began = next(iter(own.items()))
            now = asyncio.get_running_loop().time()
            if now - began >= self._patience_seconds:
                del own[timeout]
                if not timeout.expired():
                    timeout.reschedule(now)
