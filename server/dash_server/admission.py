"""Admits requests: bounds the requests and tokens inside, in total and per caller, and refuses all while draining.

Pure Python: knows no network, no device and no clock.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from dash_server.auth import Caller
from dash_server.statuses import CallerLimitReached, QueueFull, ShuttingDown


class WaitingRoom(Protocol):
    """The requests inside that have not begun and can be evicted."""

    def longest_line(self, but: str) -> int:
        """Returns the number of waiting requests of the caller with the most, other than `but`."""
        ...

    def evict_newest(self, but: str) -> None:
        """Fails the newest request of that caller with QueueFull, and frees its place at once."""
        ...


class Place:
    """One request's place inside. `release` may be called more than once."""

    def __init__(self, caller: Caller, release: Callable[["Place"], None]) -> None:
        self.caller = caller
        self.num_tokens = 0
        self._release: Callable[[Place], None] | None = release

    def release(self) -> None:
        """Gives the place back, also while its caller has yet to read the answer."""
        release, self._release = self._release, None
        if release is not None:
            release(self)


class Admission:
    """Counts the requests inside, decoding or waiting.

    When the server is full, a caller with fewer requests inside than another has waiting takes the place of that
    caller's newest request. So no caller's backlog keeps the others out.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int | None = None,
        *,
        waiting_room: WaitingRoom | None = None,
        retry_seconds: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`max_tokens` bounds prompts and output limits together; None: no bound."""
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._waiting_room = waiting_room
        self._retry_seconds = retry_seconds
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        """Those inside, and those whose answers are not read yet."""
        self.num_inside = 0
        self.num_tokens_inside = 0
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[Place]:
        """Gives one request a place until the context ends.

        Raises:
            ShuttingDown: `drain` was called.
            QueueFull: all places are taken.
            CallerLimitReached: this caller has as many requests inside as it may, or as many answers unread.
        """
        if self.is_draining:
            raise ShuttingDown
        limit = caller.limits.max_requests
        if limit is not None and self._requests[caller.name] >= limit:
            raise CallerLimitReached(f"{limit} requests at once", self._retry_seconds())
        num_unread = self._calls[caller.name] - self._requests[caller.name]
        if num_unread >= self._max_requests:
            raise CallerLimitReached(f"{self._max_requests} answers that it has not read", self._retry_seconds())
        if self.num_inside >= self._max_requests and not self._can_displace(caller, self._requests[caller.name]):
            raise self._full()
        place = Place(caller, self._leave)
        self._requests[caller.name] += 1
        self._calls[caller.name] += 1
        self.num_inside += 1
        self._idle.clear()
        try:
            yield place
        finally:
            place.release()
            self._calls[caller.name] -= 1
            if not self._calls[caller.name]:  # callers may be addresses, of which there is no end
                del self._calls[caller.name]
            if not self._calls:
                self._idle.set()

    def claim(self, place: Place, num_tokens: int) -> None:
        """Counts the tokens of a valid request. May evict requests of other callers to make room.

        Raises:
            QueueFull: there is no room.
            CallerLimitReached: this caller has as many tokens inside as it may.
        """
        caller = place.caller
        limit = caller.limits.max_tokens
        if limit is not None and self._tokens[caller.name] + num_tokens > limit:
            raise CallerLimitReached(f"{limit} tokens at once", self._retry_seconds())
        while self.num_inside > self._max_requests or (
            self._max_tokens is not None and self.num_tokens_inside + num_tokens > self._max_tokens
        ):
            if not self._can_displace(caller, self._requests[caller.name] - 1):
                raise self._full()
            assert self._waiting_room is not None
            self._waiting_room.evict_newest(but=caller.name)
        place.num_tokens = num_tokens
        self._tokens[caller.name] += num_tokens
        self.num_tokens_inside += num_tokens

    def drain(self) -> None:
        """Refuses new requests from now on; those inside may finish."""
        self._draining.set()

    async def wait_draining(self) -> None:
        """Waits until `drain` is called."""
        await self._draining.wait()

    async def wait_idle(self) -> None:
        """Waits until no request is inside, and all answers are read."""
        await self._idle.wait()

    def _can_displace(self, caller: Caller, num_others: int) -> bool:
        """True if another caller has more waiting than this one has inside, its new request included."""
        room = self._waiting_room
        return room is not None and room.longest_line(but=caller.name) > num_others + 1

    def _full(self) -> QueueFull:
        return QueueFull(self.num_inside, self._retry_seconds())

    def _leave(self, place: Place) -> None:
        name = place.caller.name
        self._requests[name] -= 1
        self._tokens[name] -= place.num_tokens
        if not self._requests[name]:
            del self._requests[name], self._tokens[name]
        self.num_inside -= 1
        self.num_tokens_inside -= place.num_tokens
