"""The state of one stream: the messages so far, and how it ended. Shared by both clients' streams.

Reads nothing by itself: a stream hands it bytes and the end of the call. Knows neither threads nor event loops.
"""

from collections.abc import Callable

import grpc

from dash_api.v1 import generation_pb2
from dash_client.calls import StreamCall
from dash_client.errors import DashError, ServerError
from dash_client.responses import StreamAssembly
from dash_client.types import Generation, GenerationStarted, StreamDelta


class StreamState:
    """The state of one stream. Once the stream has failed, every method raises the same error."""

    def __init__(self, call: StreamCall) -> None:
        self.is_over: bool = False
        """True if nothing more will come and there is nothing to cancel."""
        self._call = call
        self._read: Callable[[bytes], generation_pb2.StreamGenerateResponse] = call.read
        self._assembly = StreamAssembly(call.constraint, call.num_answers)
        self._add: Callable[[generation_pb2.StreamGenerateResponse], StreamDelta | None] = self._assembly.add
        self._error: DashError | None = None

    @property
    def has_started(self) -> bool:
        return self._assembly.started is not None

    def take(self, data: bytes) -> StreamDelta | None:
        """Takes the next message; returns its piece of the output, if it has one.

        Raises:
            ServerError: the message is invalid. The caller must then cancel the call.
        """
        try:
            return self._add(self._read(data))
        except ServerError as error:
            self._end_with(error)
            raise

    def end(self) -> None:
        """Takes the regular end of the call.

        Raises:
            ServerError: the last message is missing.
        """
        self.is_over = True
        if self._assembly.generation is None:
            raise self._end_with(
                ServerError("the stream ended without its end", code="INTERNAL", request_id=self._request_id)
            ) from None

    def fail(self, error: grpc.RpcError) -> None:
        """Takes the error that ended the call. Ignores it if the answer is already complete.

        Raises:
            DashError: the answer is incomplete.
        """
        self.is_over = True
        if not self._assembly.is_whole:
            raise self._end_with(self._call.failed(error, self._request_id)) from None

    def cancel(self) -> DashError:
        """Ends the stream because the client cancelled it; returns the error for that."""
        return self._end_with(self._call.cancelled(self._request_id))

    def check(self) -> None:
        """Raises the error of a failed stream."""
        if self._error is not None:
            raise self._error

    def started(self) -> GenerationStarted:
        """Returns the start of a stream that has started or is over."""
        self.check()
        assert self._assembly.started is not None  # a complete stream has a start
        return self._assembly.started

    def final(self) -> Generation:
        """Returns the answer of a stream that is over."""
        self.check()
        generation = self._assembly.generation
        assert generation is not None
        return generation

    def _end_with(self, error: DashError) -> DashError:
        self._error = error
        self.is_over = True
        return error

    @property
    def _request_id(self) -> str | None:
        return self._assembly.started.request_id if self._assembly.started else None
