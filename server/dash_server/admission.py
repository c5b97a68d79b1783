"""Who may come in: bounds on the requests and tokens inside, for all and for each caller, and a closed door while it
drains.

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
    """Those inside that have not begun, and may be asked to leave again."""

    def longest_line(self, but: str) -> int:
        """How many requests the caller with most waiting has there, `but` one not counted."""
        ...

    def evict_newest(self, but: str) -> None:
        """Ends the newest request of that caller, as one that found the door closed; its place is free at once."""
        ...


class Place:
    """One request's place inside. `release` may be called again."""

    def __init__(self, caller: Caller, release: Callable[["Place"], None]) -> None:
        self.caller = caller
        self.num_tokens = 0
        self._release: Callable[[Place], None] | None = release

    def release(self) -> None:
        """Gives the place back."""
        release, self._release = self._release, None
        if release is not None:
            release(self)


class Admission:
    """Counts what is inside, decoding or waiting.

    When it is full, a caller with fewer requests inside than another has waiting takes the place of that one's newest:
    so nobody is kept out by somebody else's backlog.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int | None = None,
        *,
        waiting_room: WaitingRoom | None = None,
        retry_seconds: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`max_tokens` bounds prompts and output limits together; None: nothing does."""
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._waiting_room = waiting_room
        self._retry_seconds = retry_seconds
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self.num_inside = 0
        self.num_tokens_inside = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[Place]:
        """A place for one request, for as long as the context lasts.

        Raises:
            ShuttingDown: after `drain`.
            QueueFull: all places are taken.
            CallerLimitReached: this caller has as many as it may.
        """
        if self._is_draining:
            raise ShuttingDown
        limit = caller.limits.max_requests
        if limit is not None and self._requests[caller.name] >= limit:
            raise CallerLimitReached(f"{limit} requests at once", self._retry_seconds())
        if self.num_inside >= self._max_requests and not self._can_displace(caller, self._requests[caller.name]):
            raise self._full()
        place = Place(caller, self._leave)
        self._requests[caller.name] += 1
        self.num_inside += 1
        self._idle.clear()
        try:
            yield place
        finally:
            place.release()

    def claim(self, place: Place, num_tokens: int) -> None:
        """Counts the request's tokens, once they are known and nothing is wrong with it; others may have to leave.

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
        """Lets nobody in any more; those inside may finish."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns once nobody is inside."""
        await self._idle.wait()

    def _can_displace(self, caller: Caller, num_others: int) -> bool:
        """Whether somebody has more waiting than this caller has inside, the new request included."""
        room = self._waiting_room
        return room is not None and room.longest_line(but=caller.name) > num_others + 1

    def _full(self) -> QueueFull:
        return QueueFull(self.num_inside, self._retry_seconds())

    def _leave(self, place: Place) -> None:
        name = place.caller.name
        self._requests[name] -= 1
        self._tokens[name] -= place.num_tokens
        if not self._requests[name]:  # callers may be addresses: as many as there are
            del self._requests[name], self._tokens[name]
        self.num_inside -= 1
        self.num_tokens_inside -= place.num_tokens
        if self.num_inside == 0:
            self._idle.set()
