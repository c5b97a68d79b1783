"""Who may come in: a bound on the requests inside the server, and a closed door while it drains.

Pure Python: knows no network, no device and no clock.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from dash_server.statuses import QueueFull, ShuttingDown

RETRY_AFTER_SECONDS = 1.0


class Admission:
    """Counts the requests inside, decoding or queued, up to `capacity`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_inside = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_inside(self) -> int:
        return self._num_inside

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one request, for as long as the context lasts.

        Raises:
            ShuttingDown: after `drain`.
            QueueFull: all places are taken.
        """
        if self._is_draining:
            raise ShuttingDown
        if self._num_inside >= self._capacity:
            raise QueueFull(self._capacity, RETRY_AFTER_SECONDS)
        self._num_inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._idle.set()

    def drain(self) -> None:
        """Lets nobody in any more; those inside may finish."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns once nobody is inside."""
        await self._idle.wait()
