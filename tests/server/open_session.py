"""A session with a running server, seen message by message."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from dash_api.v1 import generation_pb2
from tests.server.refusals import details_of
from tests.server.server_harness import RunningServer, bearer, generation_request


class OpenSession:
    """`messages` has all that came; `ends` the status of each generation that is over."""

    def __init__(self, server: RunningServer, token: str | None) -> None:
        self.call = server.channel.stream_stream("/dash_api.v1.GenerationService/Session")(metadata=bearer(token))
        self.messages: list[generation_pb2.SessionResponse] = []
        self.ends: dict[int, grpc.StatusCode] = {}
        self.errors: dict[int, generation_pb2.SessionError] = {}
        self.events: defaultdict[int, list[generation_pb2.StreamGenerateResponse]] = defaultdict(list)
        self._came = asyncio.Event()
        self._num_answers: dict[int, int] = {}

    async def send(self, data: bytes) -> None:
        await self.call.write(data)

    async def begin(self, number: int, fields: dict[str, Any] | None = None, **parameters: Any) -> None:
        """Begins a generation. `fields` are those of the SessionRequest."""
        own = generation_request(**parameters).parameters
        self._num_answers[number] = max(1, own.n)
        request = generation_pb2.StreamGenerateRequest(parameters=own)
        message = generation_pb2.SessionRequest(number=number, generate=request, **(fields or {}))
        await self.send(message.SerializeToString())

    async def cancel(self, number: int) -> None:
        cancel = generation_pb2.SessionCancel()
        await self.send(generation_pb2.SessionRequest(number=number, cancel=cancel).SerializeToString())

    async def until_begun(self, number: int) -> None:
        """Waits for a generation's first tokens."""
        while not any(event.HasField("delta") for event in self.events[number]):
            await self._next()

    async def end_of(self, number: int) -> grpc.StatusCode:
        """Waits for the end of a generation, and returns its status."""
        while number not in self.ends:
            await self._next()
        return self.ends[number]

    async def end(self) -> grpc.StatusCode:
        """Waits for the end of the session, and returns its status."""
        async with asyncio.timeout(30):
            return await self.call.code()

    def text(self, number: int) -> str:
        return "".join(event.delta.text for event in self.events[number])

    def details(self, number: int) -> dict[str, Any]:
        """Returns the google.rpc details of a generation's error, by type name."""
        return details_of(self.errors[number].details)

    async def _next(self) -> None:
        self._came.clear()
        async with asyncio.timeout(30):
            await self._came.wait()

    async def read(self) -> None:
        """Reads the session to its end."""
        while (data := await self.call.read()) is not grpc.aio.EOF:
            message = generation_pb2.SessionResponse.FromString(data)
            self.messages.append(message)
            for event in message.events:
                self._take(event)
            self._came.set()

    def _take(self, event: generation_pb2.SessionEvent) -> None:
        number = event.number
        assert number not in self.ends, "an event after the last one"
        if event.HasField("error"):
            self.errors[number] = event.error
            self.ends[number] = next(code for code in grpc.StatusCode if code.value[0] == event.error.code)
            return
        self.events[number].append(event.response)
        if sum(response.HasField("finished") for response in self.events[number]) == self._num_answers[number]:
            self.ends[number] = grpc.StatusCode.OK


@asynccontextmanager
async def open_session(server: RunningServer, token: str | None = None) -> AsyncIterator[OpenSession]:
    """Opens a session, and reads it. Cancels it at the end."""
    session = OpenSession(server, token)
    reading = asyncio.create_task(session.read())
    try:
        yield session
    finally:
        session.call.cancel()
        await asyncio.wait([reading])
        if not reading.cancelled():
            reading.exception()
