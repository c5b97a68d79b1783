"""What the server's link needs of a worker, and of whoever starts one. Knows no processes and no sockets."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from dash_server.worker.messages import FromWorker, ToWorker


class WorkerStartError(Exception):
    """The worker cannot be started. `is_for_user` is True if a changed setting can help."""

    def __init__(self, description: str, *, is_for_user: bool) -> None:
        super().__init__(description)
        self.is_for_user = is_for_user


class WorkerDeath(Exception):
    """The worker died before it had proved that it works."""


class StartAgain(Exception):
    """The worker ended on purpose, so that the next one starts with other options."""


class Worker(Protocol):
    """A running worker process, here or elsewhere."""

    @property
    def name(self) -> str:
        """Its process, for logs."""

    def send(self, message: ToWorker) -> None:
        """Sends in order, without waiting. Does nothing if the worker is dead."""

    def messages(self) -> AsyncGenerator[FromWorker, None]:
        """Yields the worker's messages until it dies or sends one that cannot be decoded."""

    async def deliver(self, receive: Callable[[FromWorker], None]) -> None:
        """Calls `receive` with each message as soon as it arrives, until `messages` would end. Nobody may wait in
        `messages` meanwhile."""

    async def stop(self) -> str:
        """Ends the process, and waits for that. Returns how it ended, for logs.

        A cancellation meanwhile still waits for the end: no process is left behind.
        """

    def kill(self) -> None:
        """Ends the messages at once, without waiting. `stop` is still to be called, unless the server exits."""


Result = TypeVar("Result")


async def to_its_end(ending: Coroutine[Any, Any, Result]) -> Result:
    """Waits for the end of a process, also if it is cancelled meanwhile: no process is left behind."""
    task = asyncio.create_task(ending)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


class WorkerStarter(Protocol):
    """Starts workers, one at each call."""

    async def start(self, tell: Callable[[str], None]) -> Worker:
        """Starts a process and returns it as soon as messages can be sent. A cancellation leaves no process behind.

        Args:
            tell: called with a sentence about what is waited for.

        Raises:
            WorkerStartError: it cannot be started.
            WorkerDeath: it ended before it took messages.
        """

    async def close(self) -> None:
        """Frees what workers were started with. All of them have ended."""
