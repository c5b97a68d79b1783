"""What is known of one stream: what came so far, whether it is over, and why. Shared by both clients' streams.

Takes bytes and the way a call ended; knows neither threads nor event loops, and reads nothing by itself.
"""

from collections.abc import Callable

import grpc

from dash_api.v1 import generation_pb2
from dash_client.calls import Call
from dash_client.errors import DashError, ServerError
from dash_client.responses import StreamAssembly
from dash_client.types import Generation, GenerationStarted, StreamDelta


class StreamState:
    """Fed by a stream with what its call gives. Once it has failed, everything raises the same error."""

    def __init__(self, call: Call[generation_pb2.StreamGenerateResponse]) -> None:
        self.is_over: bool = False
        """Nothing more will come, and there is nothing to cancel."""
        self._call = call
        self._read: Callable[[bytes], generation_pb2.StreamGenerateResponse] = call.read
        self._assembly = StreamAssembly()
        self._add: Callable[[generation_pb2.StreamGenerateResponse], StreamDelta | None] = self._assembly.add
        self._error: DashError | None = None

    @property
    def has_started(self) -> bool:
        return self._assembly.started is not None

    def take(self, data: bytes) -> StreamDelta | None:
        """The next message; gives back what it adds to the output, if anything.

        Raises:
            ServerError: it makes no sense. The call is to be cancelled then.
        """
        try:
            return self._add(self._read(data))
        except ServerError as error:
            self._end_with(error)
            raise

    def end(self) -> None:
        """The call ended well.

        Raises:
            ServerError: but without the last message.
        """
        self.is_over = True
        if self._assembly.generation is None:
            raise self._end_with(
                ServerError("the stream ended without its end", code="INTERNAL", request_id=self._request_id)
            ) from None

    def fail(self, error: grpc.RpcError) -> None:
        """The call ended with an error.

        Raises:
            DashError: which says so, unless the answer is whole: then it does not matter what becomes of the call.
        """
        self.is_over = True
        if self._assembly.generation is None:
            raise self._end_with(self._call.failed(error, self._request_id)) from None

    def cancel(self) -> DashError:
        """This side ended the call; gives back the error for it."""
        return self._end_with(self._call.cancelled(self._request_id))

    def check(self) -> None:
        """Raises what ended the stream, if it failed."""
        if self._error is not None:
            raise self._error

    def started(self) -> GenerationStarted:
        """The start of a stream that has one, or is over."""
        self.check()
        assert self._assembly.started is not None  # a complete stream has a start
        return self._assembly.started

    def final(self) -> Generation:
        """The answer of a stream that is over."""
        self.check()
        assert self._assembly.generation is not None
        return self._assembly.generation

    def _end_with(self, error: DashError) -> DashError:
        self._error = error
        self.is_over = True
        return error

    @property
    def _request_id(self) -> str | None:
        return self._assembly.started.request_id if self._assembly.started else None
