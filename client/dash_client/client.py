"""The synchronous client: calls, deadlines and streams; requests and answers are built elsewhere."""

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dash_api.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from dash_client import channel, requests, responses
from dash_client.errors import CancelledError, DashError, DeadlineExceededError, ServerError, UnavailableError
from dash_client.recorded import RecordedDecisions
from dash_client.status import error_from_rpc
from dash_client.types import (
    Generation,
    GenerationOptions,
    GenerationStarted,
    HealthStatus,
    ModelInfo,
    PolicyInfo,
    Prompt,
    StreamDelta,
)

FACTS_TIMEOUT_SECONDS = 10.0
"""Deadline of calls that generate nothing, where neither the client nor the call sets one."""


class DashClient:
    """A connection to a dash server. Thread-safe; use it as a context manager or call `close`.

    Example:
        with DashClient() as client:
            print(client.generate("The capital of France is", max_new_tokens=8).text)

    Args:
        target: `host:port`, or any gRPC target. Unset: DASH_TARGET, else localhost:50051. The
            connection is not encrypted.
        timeout: deadline of each call in seconds. Unset: none for generation, 10 s for the rest.

    Every method raises a `DashError`, never gRPC's own exceptions.
    """

    def __init__(self, target: str | None = None, *, timeout: float | None = None) -> None:
        self.target = channel.resolve_target(target)
        self._timeout = channel.resolve_timeout(timeout, None)
        self._closed = False
        self._channel = grpc.insecure_channel(self.target, options=channel.channel_options(self.target))
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._model = model_pb2_grpc.ModelServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls that are running are cancelled."""
        self._closed = True
        self._channel.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates, and returns when the text is complete.

        Args:
            prompt: text, token ids, or a list of `{"role": …, "content": …}` messages.
            timeout: deadline in seconds instead of the client's; infinity for none.
            options: see `GenerationOptions`.
        """
        request = generation_pb2.GenerateRequest(parameters=requests.generation_parameters(prompt, **options))
        deadline = channel.resolve_timeout(timeout, self._timeout)
        return responses.generation_from_response(self._call(self._generation.Generate, request, deadline))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> "GenerationStream":
        """Starts to generate, and returns a stream of the output. Arguments as for `generate`."""
        request = generation_pb2.StreamGenerateRequest(parameters=requests.generation_parameters(prompt, **options))
        deadline = channel.resolve_timeout(timeout, self._timeout)
        self._require_open()
        call = self._generation.StreamGenerate(request, timeout=deadline)
        return GenerationStream(call, target=self.target, timeout=deadline)

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """What model is served, and within which limits."""
        request = model_pb2.GetModelRequest()
        return responses.model_info(self._call(self._model.GetModel, request, self._facts_timeout(timeout)))

    def policy_info(self, name: str | None = None, *, timeout: float | None = None) -> PolicyInfo:
        """One policy, the default one unless named."""
        request = model_pb2.GetPolicyRequest(name=name)
        return responses.policy_info(self._call(self._model.GetPolicy, request, self._facts_timeout(timeout)))

    def tokenize(self, prompt: Prompt, *, timeout: float | None = None) -> tuple[int, ...]:
        """The token ids of text or of a conversation, exactly as a generation would see them."""
        request = requests.tokenize_request(prompt)
        return tuple(self._call(self._model.Tokenize, request, self._facts_timeout(timeout)).token_ids)

    def decisions(self, request_id: str, *, timeout: float | None = None) -> RecordedDecisions:
        """What was decided and when for one of this caller's own latest requests, which is over.

        Args:
            request_id: as in `GenerationStarted`.
            timeout: deadline in seconds instead of the client's; infinity for none.

        Raises:
            NotFoundError: the server does not hold it, or it is another caller's.
        """
        # Few programs ask; the others should not wait for its import.
        from dash_client.recorded_messages import recorded_decisions

        request = requests.decisions_request(request_id)
        return recorded_decisions(self._call(self._model.GetDecisions, request, self._facts_timeout(timeout)))

    def health(self, *, timeout: float | None = None) -> HealthStatus:
        """What the server says of itself.

        Raises:
            UnavailableError: there is no server.
        """
        request = health_pb2.HealthCheckRequest()
        return responses.health_status(self._call(self._health.Check, request, self._facts_timeout(timeout)).status)

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns when the server serves; it may be started after this call.

        Raises:
            UnavailableError: it does not within `timeout` seconds; says what it did instead.
        """
        end = time.monotonic() + timeout
        state = f"no server at {self.target}"
        while (left := end - time.monotonic()) > 0:
            try:
                status = self.health(timeout=min(left, FACTS_TIMEOUT_SECONDS))
            except (UnavailableError, DeadlineExceededError) as error:
                state = error.message
            else:
                if status is HealthStatus.SERVING:
                    return
                state = f"the server at {self.target} says {status.name}"
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
        raise UnavailableError(f"not ready after {timeout:g} s: {state}", code="UNAVAILABLE")

    def _facts_timeout(self, timeout: float | None) -> float | None:
        default = FACTS_TIMEOUT_SECONDS if self._timeout is None else self._timeout
        return channel.resolve_timeout(timeout, default)

    def _call(self, method: Callable[..., Any], request: Any, timeout: float | None) -> Any:
        self._require_open()
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise error_from_rpc(error, target=self.target, timeout=timeout) from None

    def _require_open(self) -> None:
        if self._closed:
            raise CancelledError("this client is closed", code="CANCELLED")


class GenerationStream:
    """The output of one request, as it comes: an iterator of `StreamDelta`.

    Also a context manager; leaving it before the end cancels the request on the server.

    Example:
        with client.stream("Once upon a time") as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        print(stream.final().usage)
    """

    def __init__(self, call: Any, *, target: str, timeout: float | None) -> None:
        self._call = call
        self._target = target
        self._timeout = timeout
        self._assembly = responses.StreamAssembly()
        self._error: DashError | None = None
        self._is_complete = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[StreamDelta]:
        return self

    def __next__(self) -> StreamDelta:
        while (message := self._read()) is not None:
            delta = self._take(message)
            if delta is not None:
                return delta
        raise StopIteration

    @property
    def started(self) -> GenerationStarted:
        """What is known since the request has its slot; waits for it.

        Raises:
            DashError: the request failed before that.
        """
        while self._assembly.started is None and (message := self._read()) is not None:
            self._take(message)
        assert self._assembly.started is not None  # a complete stream has a start
        return self._assembly.started

    def final(self) -> Generation:
        """The complete answer; waits for the end, and takes the deltas not yet iterated over.

        Raises:
            DashError: the request failed.
        """
        for _ in self:
            pass
        assert self._assembly.generation is not None  # else iterating has raised
        return self._assembly.generation

    def cancel(self) -> None:
        """Cancels the request on the server. Does nothing when it is over."""
        if not self._is_complete:
            self._call.cancel()

    def _read(self) -> generation_pb2.StreamGenerateResponse | None:
        """The next message, or None after the last one of a complete stream."""
        if self._error is not None:
            raise self._error
        if self._is_complete:
            return None
        try:
            return next(self._call)
        except StopIteration:
            if self._assembly.generation is None:
                raise self._fail(ServerError("the stream ended without its end", code="INTERNAL")) from None
        except grpc.RpcError as error:
            # The answer is whole once `finished` is here, whatever becomes of the connection.
            if self._assembly.generation is None:
                started = self._assembly.started
                request_id = started.request_id if started else None
                raise self._fail(
                    error_from_rpc(error, target=self._target, timeout=self._timeout, request_id=request_id)
                ) from None
        self._is_complete = True
        return None

    def _take(self, message: generation_pb2.StreamGenerateResponse) -> StreamDelta | None:
        try:
            return self._assembly.add(message)
        except ServerError as error:
            self._call.cancel()
            raise self._fail(error) from None

    def _fail(self, error: DashError) -> DashError:
        self._error = error
        return error
