"""A caller beside an attack: a stream that never rests, and new calls one after another."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from dash_api.v1 import generation_pb2, generation_pb2_grpc
from tests.server.server_harness import bearer, generation_request, open_channel

_PAUSE_SECONDS = 0.05
_MANY_IDS = [200] * 12_000
"""Stop tokens that make a message longer than what a call may send before anybody reads it."""


@dataclass
class Seen:
    """The times and failures that a bystander saw."""

    gaps: list[float] = field(default_factory=list)
    """Seconds between two messages of a stream."""
    calls: list[float] = field(default_factory=list)
    """Seconds that each short call took, on connections of their own."""
    failures: list[str] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """The 99th percentile of the gaps."""
        return statistics.quantiles(self.gaps, n=100)[98] if len(self.gaps) > 2 else float("inf")

    @property
    def longest_call(self) -> float:
        return max(self.calls, default=float("inf"))


class Bystander:
    """A caller with a token."""

    def __init__(self, port: int, token: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._server = port, credentials
        self._metadata = bearer(token)
        self._seen = Seen()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator["Bystander"]:
        """Streams and calls until the end of the context."""
        tasks = [asyncio.create_task(own()) for own in (self._stream, self._call)]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def watch(self, seconds: float) -> Seen:
        """Returns what happens in the next seconds."""
        self._seen = Seen()
        await asyncio.sleep(seconds)
        return self._seen

    async def _stream(self) -> None:
        async with open_channel(*self._server) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = generation_request(text="abc", max_new_tokens=4000)
            while True:
                with self._noted("stream"):
                    last = None
                    call = stub.StreamGenerate(
                        generation_pb2.StreamGenerateRequest(parameters=request.parameters), metadata=self._metadata
                    )
                    async for _ in call:
                        now = time.monotonic()
                        if last is not None:
                            self._seen.gaps.append(now - last)
                        last = now

    async def _call(self) -> None:
        requests = [generation_request(text="ab", max_new_tokens=2) for _ in range(2)]
        requests[1].parameters.stopping.stop_token_ids.extend(_MANY_IDS)
        async with open_channel(*self._server) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            while True:
                requests.reverse()
                with self._noted("call"):
                    began = time.monotonic()
                    await stub.Generate(requests[0], metadata=self._metadata)
                    self._seen.calls.append(time.monotonic() - began)
                await asyncio.sleep(_PAUSE_SECONDS)

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            self._seen.failures.append(f"{what}: {error.code().name} {error.details()}")
