"""Keeps the workers running: as many as there must be, and more while there is more to do.

Knows links and demand; knows no requests.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from dash_server.dispatcher import Load
from dash_server.scaling import Change, Demand, Scaler, WorkerRange
from dash_server.worker.link import WorkerLink
from dash_server.worker.starter import WorkerStartError

logger = logging.getLogger(__name__)

_TICK_SECONDS = 1.0


class WorkerPool:
    """Runs some of its links, each with one worker."""

    def __init__(
        self,
        links: Sequence[WorkerLink],
        limits: WorkerRange,
        load: Callable[[], Load],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`links` are as many as there may be workers at most."""
        self._links = links
        self._limits = limits
        self._load = load
        self._scaler = Scaler(limits, clock)
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}
        self._draining: set[WorkerLink] = set()

    async def prepare(self) -> None:
        """Starts the first worker alone, which keeps what later starts need, and ends it when it is ready.

        Raises:
            WorkerStartError: the worker cannot be started.
            DashRuntimeError: the model folder cannot be read.
        """
        try:
            first = await self._start_first()
            if self._tasks[first].done():
                self._tasks[first].result()
        finally:
            await self._end_all()

    async def run(self) -> None:
        """Keeps workers running until it is cancelled. If one is given up, the others go on.

        The first one starts alone, so that the others find its native code and measurements.

        Raises:
            WorkerStartError: the last worker was given up; see `WorkerLink.run`.
            DashRuntimeError: the model folder cannot be read.
        """
        try:
            first = await self._start_first()
            if first.is_ready:
                for link in self._links[1 : self._limits.least]:
                    self._start(link)
            pause = None if self._limits.least == self._limits.most else _TICK_SECONDS
            while True:
                await asyncio.wait(self._tasks.values(), timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                self._remove_ended()
                self._scale()
        finally:
            await self._end_all()

    async def _start_first(self) -> WorkerLink:
        """Starts the first worker, and waits until it is ready or given up."""
        first = self._links[0]
        self._start(first)
        ready = asyncio.create_task(first.wait_ready())
        try:
            await asyncio.wait({self._tasks[first], ready}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        return first

    async def _end_all(self) -> None:
        tasks = self._tasks.values()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _start(self, link: WorkerLink) -> None:
        self._tasks[link] = asyncio.create_task(link.run())

    def _remove_ended(self) -> None:
        for link, task in list(self._tasks.items()):
            if not task.done():
                continue
            del self._tasks[link]
            if link in self._draining:
                self._draining.remove(link)
                if not task.cancelled():
                    task.exception()  # nobody waits for its requests; the log has its deaths
                continue
            error = task.exception()
            remaining = self._active()
            if error is None or not remaining or not isinstance(error, WorkerStartError):
                task.result()
            logger.error("a worker is given up, %d remain: %s", len(remaining), error)

    def _scale(self) -> None:
        for link in self._draining:
            if not link.num_requests:
                self._tasks[link].cancel()
        load = self._load()
        num_workers = len(self._tasks) - len(self._draining)
        demand = Demand(num_workers, load.num_workers, load.num_slots, load.num_running, load.num_waiting)
        match self._scaler.change(demand):
            case Change.ADD:
                logger.info("requests wait: worker %d of at most %d is added", num_workers + 1, self._limits.most)
                self._add()
            case Change.REMOVE:
                logger.info("little to do: %d of %d workers remain", num_workers - 1, num_workers)
                link = min(self._active(), key=lambda link: link.num_reserved_tokens)
                link.drain()
                self._draining.add(link)

    def _add(self) -> None:
        if self._draining:
            self._draining.pop().resume()
        else:
            self._start(next(link for link in self._links if link not in self._tasks))

    def _active(self) -> list[WorkerLink]:
        return [link for link in self._tasks if link not in self._draining]
