"""Threads that read requests, in turns between callers. Knows callers' names; knows no requests."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dash_server.turns import Turns

T = TypeVar("T")


class Readers:
    """A few threads, off the event loop. A function whose caller is gone is not begun."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._turns = Turns(num_threads)

    async def run(self, caller: str, function: Callable[[], T]) -> T:
        """Runs the function when it is this caller's turn.

        Raises:
            QueueFull: too many wait for their turn.
        """
        await self._turns.take(caller)
        loop = asyncio.get_running_loop()
        reading = self._threads.submit(function)

        # Whoever waits may be cancelled, but the thread reads on.
        def over(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                loop.call_soon_threadsafe(self._turns.leave, caller)

        reading.add_done_callback(over)
        return await asyncio.wrap_future(reading)

    def close(self) -> None:
        """Begins nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
