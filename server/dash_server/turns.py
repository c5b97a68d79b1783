"""Places that callers take in turn: a free one goes to the waiting caller that holds the fewest.

Knows names of callers; knows no requests and no clock.
"""

import asyncio
from collections import Counter, deque

from dash_server.statuses import QueueFull


class Turns:
    """A number of places. Those who wait are bounded, too: the caller with the most waiting is refused first."""

    def __init__(self, num_places: int, most_waiting: int = 1024) -> None:
        self._num_free = num_places
        self._most_waiting = most_waiting
        self._held: Counter[str] = Counter()
        # In the order in which callers are to be served if they hold equally many places.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self.num_waiting = 0

    async def take(self, name: str) -> None:
        """Waits for a place; `leave` gives it back.

        Raises:
            QueueFull: too many wait.
        """
        if self.take_now(name):
            return
        if self.num_waiting >= self._most_waiting:
            self._refuse_one(name)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, deque()).append(turn)
        self.num_waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._waiting.get(name, ()):
                self._waiting[name].remove(turn)
                self._forget(name)
            elif not turn.cancelled() and turn.exception() is None:
                self.leave(name)  # the place was given at the same moment
            raise

    def take_now(self, name: str) -> bool:
        """Takes a place if one is free; returns whether it did."""
        if self._num_free:
            self._grant(name)
            return True
        return False

    def leave(self, name: str) -> None:
        """Gives a place of this caller back."""
        self._held[name] -= 1
        if not self._held[name]:  # callers may be addresses, of which there is no end
            del self._held[name]
        self._num_free += 1
        while self._waiting and self._num_free:
            # `min` takes the first of equals.
            following = min(self._waiting, key=self._held.__getitem__)
            turns = self._waiting.pop(following)
            turn = turns.popleft()
            self.num_waiting -= 1
            if turns:
                self._waiting[following] = turns  # behind the others
            if not turn.done():  # else it was cancelled at the same moment
                self._grant(following)
                turn.set_result(None)

    def _grant(self, name: str) -> None:
        self._num_free -= 1
        self._held[name] += 1

    def _refuse_one(self, name: str) -> None:
        """Makes room among those who wait, unless nobody has more waiting than this caller would have."""
        heaviest = max(self._waiting, key=lambda own: len(self._waiting[own]))
        if len(self._waiting[heaviest]) <= len(self._waiting.get(name, ())) + 1:
            raise QueueFull(self.num_waiting, 1.0)
        turn = self._waiting[heaviest].pop()
        if not turn.done():
            turn.set_exception(QueueFull(self.num_waiting, 1.0))
        self._forget(heaviest)

    def _forget(self, name: str) -> None:
        """Counts one who no longer waits."""
        self.num_waiting -= 1
        if not self._waiting[name]:
            del self._waiting[name]
