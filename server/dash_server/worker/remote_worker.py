"""A worker process that somebody else started and that has connected to the server over TCP.

Knows no Ray and no requests.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from dash_server.worker.connection import FramedConnection
from dash_server.worker.messages import FromWorker, Shutdown, ToWorker
from dash_server.worker.starter import to_its_end

logger = logging.getLogger(__name__)

# Time for a worker to exit by itself, and for the word that a killed one has ended.
_SECONDS_PER_STAGE = 3.0


@dataclass(slots=True)
class RemoteProcess:
    """What its starter knows of a worker process."""

    name: str = "a worker"
    ended: "asyncio.Future[str]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """How it ended, in words."""


class RemoteWorker:
    """A running worker on another machine. See `Worker`."""

    def __init__(
        self,
        connection: FramedConnection[FromWorker],
        process: RemoteProcess,
        kill: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._process = process
        self._ended = process.ended
        self._kill = kill

    @property
    def name(self) -> str:
        return self._process.name

    def send(self, message: ToWorker) -> None:
        self._connection.send(message)

    def messages(self) -> AsyncGenerator[FromWorker, None]:
        return self._connection.messages()

    async def deliver(self, receive: Callable[[FromWorker], None]) -> None:
        await self._connection.deliver(receive)

    async def stop(self) -> str:
        """Asks the process to exit, then has it killed. See `Worker`."""
        return await to_its_end(self._end())

    async def _end(self) -> str:
        self.send(Shutdown())
        self._connection.close()
        await asyncio.wait([self._ended], timeout=_SECONDS_PER_STAGE)
        if not self._ended.done():
            logger.warning("%s does not exit and is killed", self.name)
            self._kill()
            await asyncio.wait([self._ended], timeout=_SECONDS_PER_STAGE)
        self._connection.abort()
        return self._ended.result() if self._ended.done() else "nobody says how"

    def kill(self) -> None:
        """Cuts the connection and has the process killed, without waiting."""
        self._connection.abort()
        self._kill()
