"""The streams of both clients. Each reads its call in its own way, sync or async, and feeds a `StreamState`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import grpc

from dash_client.errors import DashError
from dash_client.stream_state import StreamState
from dash_client.types import Generation, GenerationStarted, StreamDelta


class GenerationStream:
    """The output of one request, as it comes: an iterator of `StreamDelta`.

    Also a context manager. Leaving it before the end cancels the request on the server; so does dropping the stream.

    Example:
        with client.stream("Once upon a time") as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        print(stream.final().usage)
    """

    def __init__(self, call: Any, state: StreamState) -> None:
        self._call = call
        self._state = state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # At interpreter shutdown, gRPC may be gone already.
        with contextlib.suppress(Exception):
            self.cancel()

    def __iter__(self) -> Iterator[StreamDelta]:
        return self

    def __next__(self) -> StreamDelta:
        while not self._state.is_over:
            if (delta := self._read()) is not None:
                return delta
        self._state.check()
        raise StopIteration

    @property
    def started(self) -> GenerationStarted:
        """The facts that are known once the request has its slot; waits for the slot.

        Raises:
            DashError: the request failed before it got its slot.
        """
        while not (self._state.has_started or self._state.is_over):
            self._read()
        return self._state.started()

    def final(self) -> Generation:
        """Returns the complete answer. Waits for the end, and consumes the remaining deltas.

        Raises:
            DashError: the request failed.
        """
        for _ in self:
            pass
        return self._state.final()

    def cancel(self) -> None:
        """Cancels the request on the server. Does nothing if it is over."""
        if not self._state.is_over:
            self._call.cancel()

    def _read(self) -> StreamDelta | None:
        """Reads one message or the end; returns the message's piece of the output, if it has one."""
        try:
            return self._state.take(next(self._call))
        except StopIteration:
            self._state.end()
        except grpc.RpcError as error:
            self._state.fail(error)
        except DashError:
            self._call.cancel()
            raise
        return None


class AsyncGenerationStream:
    """The output of one request, as it comes: an async iterator of `StreamDelta`.

    Also an async context manager. Leaving it before the end cancels the request on the server; so does dropping the
    stream.

    Example:
        async with client.stream("Once upon a time") as stream:
            async for delta in stream:
                print(delta.text, end="", flush=True)
        print((await stream.final()).usage)
    """

    def __init__(self, call: Any, state: StreamState) -> None:
        self._call = call
        self._messages: AsyncIterator[bytes] = call.__aiter__()
        self._state = state
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # The garbage collector may run in any thread, and after the loop has closed.
        with contextlib.suppress(Exception):
            if not self._state.is_over:
                self._loop.call_soon_threadsafe(self._call.cancel)

    def __aiter__(self) -> AsyncIterator[StreamDelta]:
        return self

    async def __anext__(self) -> StreamDelta:
        while not self._state.is_over:
            if (delta := await self._read()) is not None:
                return delta
        self._state.check()
        raise StopAsyncIteration

    async def started(self) -> GenerationStarted:
        """The facts that are known once the request has its slot; waits for the slot.

        Raises:
            DashError: the request failed before it got its slot.
        """
        while not (self._state.has_started or self._state.is_over):
            await self._read()
        return self._state.started()

    async def final(self) -> Generation:
        """Returns the complete answer. Waits for the end, and consumes the remaining deltas.

        Raises:
            DashError: the request failed.
        """
        async for _ in self:
            pass
        return self._state.final()

    def cancel(self) -> None:
        """Cancels the request on the server. Does nothing if it is over. Not awaited."""
        if not self._state.is_over:
            self._call.cancel()

    async def _read(self) -> StreamDelta | None:
        """Reads one message or the end; returns the message's piece of the output, if it has one."""
        try:
            return self._state.take(await anext(self._messages))
        except StopAsyncIteration:
            self._state.end()
        except grpc.RpcError as error:
            self._state.fail(error)
        except asyncio.CancelledError:
            # gRPC does so only while it reads: a call that it is still beginning would go on.
            self._call.cancel()
            cancelled = self._state.cancel()
            if is_task_cancelled():
                raise
            # Somebody cancelled the stream, not this task.
            raise cancelled from None
        except DashError:
            self._call.cancel()
            raise
        return None


def is_task_cancelled() -> bool:
    """Returns True if the running task is being cancelled; gRPC raises the same exception for a cancelled call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
