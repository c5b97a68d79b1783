"""The session of the synchronous client. `session_stream` says what is sent, and to whom what comes belongs."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self, Unpack

import grpc

from dash_api.v1 import generation_pb2
from dash_client.calls import Calls, StreamCall
from dash_client.options import GenerationOptions, Messages, Prompt
from dash_client.session_stream import Attempts, Item, SessionStream, SessionStreams, state_of
from dash_client.streams import GenerationStream
from dash_client.types import Generation


class Session:
    """Many requests on one stream, for programs that have many at once. Thread-safe; use it as a context manager.

    Each message of the server has what all of the session's requests have to say at that moment, so that a token
    takes both sides less time. Its methods are those of `DashClient`, with the same arguments and errors. A request
    changes nothing for the others. All go to one server, until it goes away.

    Example:
        with client.session() as session:
            streams = [session.stream(prompt, max_new_tokens=8) for prompt in ("One", "Two", "Three")]
            print([stream.final().text for stream in streams])
    """

    def __init__(self, calls: Calls, retries: int, open_call: Callable[[Iterator[bytes]], Any]) -> None:
        """`open_call` begins the call of a stream with its requests."""
        self._calls = calls
        self._retries = retries
        self._open_call = open_call
        self._streams = SessionStreams(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Closes the session, and cancels the requests that are running in it."""
        self._streams.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates text, and returns the complete answer. Arguments as for `DashClient.generate`."""
        return self.stream(prompt, timeout=timeout, **options).final()

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> GenerationStream:
        """Starts to generate, and returns a stream of the output. Arguments as for `DashClient.generate`."""
        return self._start(self._calls.stream(prompt, timeout, options))

    def chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates the next message of a conversation. Arguments as for `DashClient.chat`."""
        return self.chat_stream(messages, timeout=timeout, **options).final()

    def chat_stream(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> GenerationStream:
        """Starts to generate the next message of a conversation. Arguments as for `DashClient.chat`."""
        return self._start(self._calls.chat_stream(messages, timeout, options))

    def _start(self, call: StreamCall) -> GenerationStream:
        return GenerationStream(_Generation(self._streams, call, self._retries), state_of(call))

    def _open(self) -> SessionStream:
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = self._open_call(iter(requests.get, None))
        stream = SessionStream(requests.put, call.cancel)
        threading.Thread(target=_read, args=(call, stream), name="dash-session", daemon=True).start()
        return stream


def _read(call: Any, stream: SessionStream) -> None:
    """Reads a stream to its end."""
    error: grpc.RpcError | None = None
    try:
        for data in call:
            stream.take(data)
    except grpc.RpcError as ended:
        error = ended
        call.cancel()
    finally:
        stream.end(error)


class _Generation:
    """One generation of a session, as a `GenerationStream` reads it."""

    def __init__(self, streams: SessionStreams, call: StreamCall, retries: int) -> None:
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._attempts = Attempts(streams, self._inbox, call, retries)

    def __next__(self) -> generation_pb2.StreamGenerateResponse:
        attempts = self._attempts
        while not attempts.is_over:
            if (item := self._wait(attempts.seconds_left())) is None:
                attempts.expire()
                continue
            answer = attempts.read(item)
            if not isinstance(answer, float):
                return answer
            if (item := self._wait(attempts.seconds_left(answer))) is not None:
                self._inbox.put(item)  # it was cancelled meanwhile
            elif attempts.seconds_left() != 0:
                attempts.again()
        attempts.close()
        raise StopIteration

    def cancel(self) -> None:
        self._attempts.cancel()

    def _wait(self, seconds: float | None) -> Item | None:
        """Waits for the next item; returns None if there is none in time."""
        try:
            return self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
