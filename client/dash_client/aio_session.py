"""The session of the asynchronous client. Has the same methods as `session`; only the waiting differs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, Unpack

import grpc

from dash_api.v1 import generation_pb2
from dash_client.calls import Calls, StreamCall
from dash_client.options import GenerationOptions, Messages, Prompt
from dash_client.session_stream import Attempts, Failure, Item, SessionStream, SessionStreams, details_of, state_of
from dash_client.streams import AsyncGenerationStream
from dash_client.types import Generation


class AsyncSession:
    """Many requests on one stream, for programs that have many at once; use it as an async context manager.

    Each message of the server has what all of the session's requests have to say at that moment, so that a token
    takes both sides less time. Its methods are those of `AsyncDashClient`, with the same arguments and errors. A
    request changes nothing for the others. All go to one server, until it goes away.

    Example:
        async with client.session() as session:
            streams = [session.stream(prompt, max_new_tokens=8) for prompt in ("One", "Two", "Three")]
            print([(await stream.final()).text for stream in streams])
    """

    def __init__(self, calls: Calls, retries: int, open_call: Callable[[AsyncIterator[bytes]], Any]) -> None:
        """`open_call` begins the call of a stream with its requests."""
        self._calls = calls
        self._retries = retries
        self._streams = SessionStreams(lambda: open_stream(open_call, self._readers))
        self._readers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the session, and cancels the requests that are running in it."""
        self._streams.close()
        if self._readers:
            await asyncio.wait(self._readers)

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates text, and returns the complete answer. Arguments as for `AsyncDashClient.generate`."""
        async with self.stream(prompt, timeout=timeout, **options) as stream:
            return await stream.final()

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncGenerationStream:
        """Starts to generate, and returns a stream of the output; not awaited. Arguments as for `generate`."""
        return self._start(self._calls.stream(prompt, timeout, options))

    async def chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates the next message of a conversation. Arguments as for `AsyncDashClient.chat`."""
        async with self.chat_stream(messages, timeout=timeout, **options) as stream:
            return await stream.final()

    def chat_stream(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncGenerationStream:
        """Starts to generate the next message of a conversation; not awaited. Arguments as for `chat`."""
        return self._start(self._calls.chat_stream(messages, timeout, options))

    def _start(self, call: StreamCall) -> AsyncGenerationStream:
        return AsyncGenerationStream(_Generation(self._streams, call, self._retries), state_of(call))


def open_stream(open_call: Callable[[AsyncIterator[bytes]], Any], readers: set[asyncio.Task[None]]) -> SessionStream:
    """Opens a session's stream, whose call `open_call` begins. A task of `readers` reads it to its end."""
    requests: asyncio.Queue[bytes | None] = asyncio.Queue()
    call = open_call(_until_none(requests))
    stream = SessionStream(requests.put_nowait, call.cancel)
    reader = asyncio.create_task(_read(call, stream))
    readers.add(reader)
    reader.add_done_callback(readers.discard)
    return stream


async def _until_none(requests: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (request := await requests.get()) is not None:
        yield request


async def _read(call: Any, stream: SessionStream) -> None:
    """Reads a stream to its end."""
    error: grpc.RpcError | None = None
    try:
        async for data in call:
            stream.take(data)
    except grpc.RpcError as ended:
        error = ended
        call.cancel()
        if ended.code() is grpc.StatusCode.INTERNAL and not details_of(ended):
            # grpc.aio's own word for a stream that the server ended while a request was on its way.
            error = Failure(grpc.StatusCode.UNAVAILABLE, "the server has ended the session")
    except asyncio.CancelledError:
        error = Failure(grpc.StatusCode.CANCELLED, "the session was closed")
    finally:
        stream.end(error)


class _Generation:
    """One generation of a session, as an `AsyncGenerationStream` reads it."""

    def __init__(self, streams: SessionStreams, call: StreamCall, retries: int) -> None:
        self._inbox: asyncio.Queue[Item] = asyncio.Queue()
        self._attempts = Attempts(streams, self._inbox, call, retries)
        self._timer: asyncio.TimerHandle | None = None
        if (seconds := self._attempts.seconds_left()) is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._attempts.expire)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> generation_pb2.StreamGenerateResponse:
        attempts = self._attempts
        while not attempts.is_over:
            try:
                answer = attempts.read(await self._inbox.get())
            except grpc.RpcError:
                self._stop_timer()
                raise
            if not isinstance(answer, float):
                return answer
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(answer):
                    self._inbox.put_nowait(await self._inbox.get())  # it was cancelled meanwhile
                continue
            attempts.again()
        self._stop_timer()
        attempts.close()
        raise StopAsyncIteration

    def cancel(self) -> None:
        self._stop_timer()
        self._attempts.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
