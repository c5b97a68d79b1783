"""The generations of a session's stream by their numbers, and the attempts of each. Shared by both clients.

Reads and sends nothing by itself, and waits for nothing.
"""

import dataclasses
import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from dash_api.v1 import generation_pb2
from dash_client.calls import StreamCall, closed_error
from dash_client.channel import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, PAUSE_FACTOR, RETRIED_CODES
from dash_client.connection import TRACE_KEYS
from dash_client.rpc_errors import DETAILS_KEY, retry_seconds, rich_details
from dash_client.stream_state import StreamState

# What a stream that was refused so would refuse again: its server goes away, or its token is no longer valid.
_RETIRING = (grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.UNAUTHENTICATED.value[0])
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Failure(grpc.RpcError):
    """The status of one generation, as gRPC's own errors give the status of a call."""

    def __init__(self, code: grpc.StatusCode, message: str, details: bytes = b"") -> None:
        super().__init__(message)
        self._code, self._message, self._details = code, message, details

    @classmethod
    def of(cls, error: generation_pb2.SessionError) -> "Failure":
        """Returns what the server says of a generation that has failed."""
        return cls(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message, error.details)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._message

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((DETAILS_KEY, self._details),) if self._details else ()


Item: TypeAlias = generation_pb2.SessionEvent | grpc.RpcError
"""An event of a generation, or the error that ended its stream."""


class Inbox(Protocol):
    """A queue of one generation's items, in the way of a client."""

    def put_nowait(self, item: Item) -> None: ...


class SessionStream:
    """One stream of a session. Thread-safe."""

    def __init__(self, send: Callable[[bytes | None], None], close: Callable[[], object]) -> None:
        """`send` queues a message for the server; None ends the client's side. `close` cancels the call."""
        self.close = close
        self._send = send
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._takes_more = True
        # A stream that is dropped cancels its generation, and may be dropped by the garbage collector in here.
        self._lock = threading.RLock()

    def begin(self, request: generation_pb2.SessionRequest, inbox: Inbox) -> int | None:
        """Sends a request under a new number, and returns that; None if the stream takes no more."""
        with self._lock:
            if not self._takes_more:
                return None
            request.number = number = next(self._numbers)
            self._inboxes[number] = inbox
            self._send(request.SerializeToString())
            return number

    def cancel(self, number: int) -> None:
        """Cancels a generation, whose events are of no more use. Does nothing if it is over."""
        with self._lock:
            if number in self._inboxes:
                cancel = generation_pb2.SessionCancel()
                self._send(generation_pb2.SessionRequest(number=number, cancel=cancel).SerializeToString())
                self.forget(number)

    def forget(self, number: int) -> None:
        """Forgets a generation that is over."""
        with self._lock:
            self._inboxes.pop(number, None)
            if not self._takes_more and not self._inboxes:
                self._send(None)

    def take(self, data: bytes) -> None:
        """Hands out the events of a message.

        Raises:
            Failure: it is not a message of a session.
        """
        try:
            events = generation_pb2.SessionResponse.FromString(data).events
        except DecodeError:
            raise Failure(grpc.StatusCode.INTERNAL, "the server's message is not a SessionResponse") from None
        with self._lock:
            for event in events:
                if (inbox := self._inboxes.get(event.number)) is not None:
                    inbox.put_nowait(event)
                if event.HasField("error"):
                    if event.error.code in _RETIRING:
                        self._takes_more = False
                    self.forget(event.number)

    def end(self, error: grpc.RpcError | None) -> None:
        """Takes the end of the stream, which is that of all its generations."""
        error = error or Failure(grpc.StatusCode.UNAVAILABLE, "the server has ended the session")
        with self._lock:
            self._takes_more = False
            inboxes, self._inboxes = list(self._inboxes.values()), {}
            self._send(None)  # whoever waits for requests may go
        for inbox in inboxes:
            inbox.put_nowait(Failure(error.code(), error.details() or "", details_of(error)))


class SessionStreams:
    """The stream of a session that takes new generations, and former ones until theirs are over. Thread-safe."""

    def __init__(self, opened: Callable[[], SessionStream]) -> None:
        """`opened` opens a stream."""
        self._opened = opened
        self._streams: weakref.WeakSet[SessionStream] = weakref.WeakSet()
        self._newest: SessionStream | None = None
        self._is_closed = False
        self._lock = threading.RLock()

    def begin(self, request: generation_pb2.SessionRequest, inbox: Inbox) -> tuple[SessionStream, int] | None:
        """Sends a request. Returns its stream and its number there; None if the session is closed."""
        with self._lock:
            while not self._is_closed:
                if self._newest is not None and (number := self._newest.begin(request, inbox)) is not None:
                    return self._newest, number
                self._newest = self._opened()
                self._streams.add(self._newest)
            return None

    def close(self) -> None:
        """Cancels all generations, and takes no more."""
        with self._lock:
            self._is_closed = True
            for stream in list(self._streams):
                stream.close()


class Attempts:
    """One generation of a session, over all its attempts: it is tried again while the server has not begun it."""

    def __init__(self, streams: SessionStreams, inbox: Inbox, call: StreamCall, retries: int) -> None:
        """Makes the first attempt.

        Raises:
            CancelledError: the session is closed.
        """
        self._streams = streams
        self._inbox = inbox
        self._call = call
        assert isinstance(call.request, bytes)
        self._request = generation_pb2.StreamGenerateRequest.FromString(call.request)
        self._retries = retries
        self._num_attempts = 0
        self._ends_at = math.inf if call.timeout is None else time.monotonic() + call.timeout
        self._has_begun = False
        self._num_answers_left = call.num_answers
        if not self._begin():
            raise closed_error("session")

    @property
    def is_over(self) -> bool:
        """True if the answer is complete."""
        return self._num_answers_left == 0

    def seconds_left(self, pause: float = math.inf) -> float | None:
        """Returns the time until the deadline, or `pause` if that is shorter; not below 0. None if there is neither."""
        seconds = min(pause, self._ends_at - time.monotonic())
        return None if seconds == math.inf else max(0.0, seconds)

    def read(self, item: Item) -> generation_pb2.StreamGenerateResponse | float:
        """Returns the event of an item; or, in seconds, the pause before the next attempt.

        Raises:
            grpc.RpcError: the generation has failed.
        """
        if isinstance(item, grpc.RpcError):
            return self._pause(item)
        if item.HasField("error"):
            return self._pause(Failure.of(item.error))
        self._has_begun = True
        if item.response.HasField("finished"):
            self._num_answers_left -= 1
        return item.response

    def again(self) -> None:
        """Makes the next attempt.

        Raises:
            grpc.RpcError: the session is closed.
        """
        if not self._begin():
            raise _cancelled()

    def cancel(self) -> None:
        """Ends the generation by the client's wish."""
        self._end_with(_cancelled())

    def expire(self) -> None:
        """Ends the generation because its deadline has passed."""
        self._end_with(Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed"))

    def close(self) -> None:
        """Forgets a generation that is over."""
        self._stream.forget(self._number)

    def _begin(self) -> bool:
        """Sends the request; returns False if the session is closed."""
        self._num_attempts += 1
        trace: dict[str, Any] = {key: value for key, value in self._call.metadata if key in TRACE_KEYS}
        # The server refuses 0. A generation whose deadline has passed is told so by its own clock.
        seconds = None if self._ends_at == math.inf else max(1e-6, self._ends_at - time.monotonic())
        request = generation_pb2.SessionRequest(generate=self._request, timeout_seconds=seconds, **trace)
        begun = self._streams.begin(request, self._inbox)
        if begun is not None:
            self._stream, self._number = begun
        return begun is not None

    def _end_with(self, failure: Failure) -> None:
        self._retries = 0  # this attempt is the last one
        self._stream.cancel(self._number)
        self._inbox.put_nowait(failure)

    def _pause(self, error: grpc.RpcError) -> float:
        if self._has_begun or self._num_attempts > self._retries or error.code() not in RETRIED_CODES:
            raise error
        asked = retry_seconds(rich_details(error.trailing_metadata()))
        usual = FIRST_PAUSE_SECONDS * float(PAUSE_FACTOR) ** (self._num_attempts - 1)
        return min(usual, float(LONGEST_PAUSE_SECONDS)) if asked is None else asked


def state_of(call: StreamCall) -> StreamState:
    """Returns the state of a stream whose messages come already read."""
    return StreamState(dataclasses.replace(call, read=_as_it_is))


def _as_it_is(message: Any) -> Any:
    return message


def _cancelled() -> Failure:
    return Failure(grpc.StatusCode.CANCELLED, "the call was cancelled")


def details_of(error: grpc.RpcError) -> bytes:
    """Returns the google.rpc.Status of an error, serialised; empty if it has none."""
    found: bytes = dict(error.trailing_metadata() or ()).get(DETAILS_KEY, b"")
    return found
