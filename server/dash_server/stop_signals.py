"""Waits for the signals that end a server: the first SIGTERM or SIGINT drains it, a second one ends it at once."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable

logger = logging.getLogger(__name__)


class StopSignals:
    """Handles the signals from now on, in the running event loop."""

    def __init__(self) -> None:
        self._requested = asyncio.Event()
        self.at_the_second: Callable[[], object] = lambda: None
        """Called before a second signal ends the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    async def first(self) -> None:
        """Waits for the first signal."""
        await self._requested.wait()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._requested.is_set():
            self.at_the_second()
            os._exit(128 + number)
        logger.info("%s: shutting down; a second one ends the server at once", number.name)
        self._requested.set()
