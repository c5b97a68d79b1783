"""A frozen event loop ends its process; one that turns does not."""

import asyncio
import threading
import time

from dash_server.loop_watch import watch_loop


def ended(loop_work: float, ticks: int) -> bool:
    """True if the watch ends a process whose loop is busy for so many seconds in one go."""
    ends = threading.Event()

    async def work() -> None:
        watch = watch_loop(asyncio.get_running_loop(), ends.set, ticks, tick_seconds=0.01)
        await asyncio.sleep(0.05)
        time.sleep(loop_work)
        await asyncio.sleep(0.05)
        assert watch.is_alive() != ends.is_set()

    asyncio.run(work())
    return ends.is_set()


def test_a_frozen_loop_ends_its_process() -> None:
    assert ended(0.6, ticks=20)


def test_a_busy_loop_does_not() -> None:
    assert not ended(0.1, ticks=1000)
