"""Callers who make one request after another until they are told to stop, in calls of their own or within sessions."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import grpc

from benchmarks.soak.service import STUCK_SECONDS, Outcomes, Service
from dash_api.v1 import generation_pb2
from dash_client.aio_session import open_stream
from dash_client.session_stream import Failure, Item, SessionStreams

_PAUSE_SECONDS = 0.25
"""The pause of a caller whose request has failed."""


@asynccontextmanager
async def callers(
    number: int, seed: str, request: Callable[[random.Random], Awaitable[None]], outcomes: Outcomes
) -> AsyncIterator[None]:
    """Runs so many callers of `request` as long as the block lasts, and then until their last requests are over."""
    is_over = asyncio.Event()

    async def caller(rng: random.Random) -> None:
        while not is_over.is_set():
            try:
                async with asyncio.timeout(STUCK_SECONDS):
                    await request(rng)
            except (grpc.RpcError, TimeoutError) as error:
                outcomes.add(error)
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                outcomes.add(None)

    running = [asyncio.create_task(caller(random.Random(f"{seed} {own}"))) for own in range(number)]
    try:
        yield
    finally:
        is_over.set()
        await asyncio.gather(*running)


@asynccontextmanager
async def callers_of(
    service: Service,
    number: int,
    seed: str,
    request: "Callable[[random.Random, Service | Sessions], Awaitable[None]]",
    outcomes: Outcomes,
) -> AsyncIterator[None]:
    """Runs `callers`, each of whose requests is told to go to the service in a call of its own, or within a session."""
    sessions = Sessions(service)
    async with callers(number, seed, lambda rng: request(rng, rng.choice([service, sessions])), outcomes):
        yield
    await sessions.close()


async def whole_answer(
    messages: AsyncGenerator[generation_pb2.StreamGenerateResponse],
) -> list[generation_pb2.StreamGenerateResponse]:
    """Returns all messages of an answer."""
    async with aclosing(messages) as stream:
        return [message async for message in stream]


class Sessions:
    """Opens a session for all requests of a caller; a new one when the former has ended."""

    def __init__(self, service: Service) -> None:
        open_call = service.channel.stream_stream("/dash_api.v1.GenerationService/Session")
        self._readers: set[asyncio.Task[None]] = set()
        self._streams = SessionStreams(lambda: open_stream(open_call, self._readers))

    async def stream(
        self, parameters: generation_pb2.GenerationParameters, timeout: float | None = None
    ) -> AsyncGenerator[generation_pb2.StreamGenerateResponse]:
        """Does as `Service.stream`, as one generation among the session's."""
        inbox: asyncio.Queue[Item] = asyncio.Queue()
        generate = generation_pb2.StreamGenerateRequest(parameters=parameters)
        begun = self._streams.begin(generation_pb2.SessionRequest(generate=generate, timeout_seconds=timeout), inbox)
        assert begun is not None
        stream, number = begun
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, grpc.RpcError):
                    raise item
                if item.HasField("error"):
                    raise Failure.of(item.error)
                yield item.response
                if item.response.HasField("finished"):
                    stream.forget(number)
                    return
        finally:
            stream.cancel(number)

    async def close(self) -> None:
        """Ends the sessions."""
        self._streams.close()
        if self._readers:
            await asyncio.wait(self._readers)
