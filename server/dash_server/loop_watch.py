"""Ends a server whose event loop no longer turns, so that whoever runs it starts another. Knows no server.

A probe that only opens a connection cannot tell: the kernel takes connections for a frozen process, too.
"""

import asyncio
import faulthandler
import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

FROZEN_SECONDS = 60


def watch_loop(
    loop: asyncio.AbstractEventLoop, end: Callable[[], None], ticks: int = FROZEN_SECONDS, tick_seconds: float = 1.0
) -> threading.Thread:
    """Starts a thread that calls `end` once the loop has not turned for so many ticks, until the loop is closed.

    Ticks are counted, not seconds: while the whole process was stopped, there were none.
    """

    def watch() -> None:
        while not loop.is_closed():
            turned = threading.Event()
            try:
                loop.call_soon_threadsafe(turned.set)
            except RuntimeError:  # it was closed at this moment
                return
            if not any(turned.wait(tick_seconds) for _ in range(ticks)):
                if not loop.is_closed():
                    logger.error("the event loop has not turned for %g s: this process ends", ticks * tick_seconds)
                    faulthandler.dump_traceback()
                    end()
                return
            threading.Event().wait(tick_seconds)

    thread = threading.Thread(target=watch, name="loop-watch", daemon=True)
    thread.start()
    return thread
