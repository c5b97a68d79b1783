"""The standard health service, for the whole server and for each of its services, and as `alive` and `ready`.

Replaces grpc_health's asynchronous servicer, which forgets all watchers of a service when one of them leaves, and whose
watchers outlive a shutdown. Knows no model and no worker.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dash_server.auth import address_of
from dash_server.statuses import CallerLimitReached

MOST_WATCHES = 256
"""The most watches of one address, which need no token."""
_Status = health_pb2.HealthCheckResponse
ALIVE = "alive"
"""SERVING whenever there is an answer: who asks for it restarts a server that does not answer. A draining one takes no
more calls, and ends by itself."""
READY = "ready"
"""SERVING while new requests are taken, as the whole server is."""


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The health service; NOT_SERVING until `set_serving`."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset({"", ALIVE, READY, *services})
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()
        self._watches: Counter[str] = Counter()

    def set_serving(self, is_serving: bool) -> None:
        self._is_serving = is_serving
        self._wake()

    def close(self) -> None:
        """Ends the watches. The status stays NOT_SERVING."""
        self._is_serving = False
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._is_serving or service == ALIVE else _Status.NOT_SERVING

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return _Status(status=status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        address = address_of(context.peer())
        if self._watches[address] >= MOST_WATCHES:
            raise CallerLimitReached(f"{MOST_WATCHES} watches of health at once", 1.0)
        self._watches[address] += 1
        try:
            await self._tell(request.service, context)
        finally:
            self._watches[address] -= 1
            if not self._watches[address]:
                del self._watches[address]

    async def _tell(self, service: str, context: grpc.aio.ServicerContext) -> None:
        last = None
        while True:
            changed = self._changed
            status = self._status(service)
            if status != last:
                await context.write(_Status(status=status))
                last = status
            if self._is_closed:
                return
            await changed.wait()
