"""Records the facts of one generation call, from its beginning to its end, for observers of calls.

The service and the generation fill in the record; spans, metrics and kept decisions are made from it at the end. It
never holds a prompt or an output unless a setting asks for them. Knows no observer.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from opentelemetry.trace import SpanContext

from dash_runtime.events import EndReason, SequenceFinished, SlotGranted, TokenLogprobs
from dash_server.auth import Caller
from dash_server.from_pb import PreparedRequest
from dash_server.statuses import failure_of

PROVIDER_NAME = "dash"
"""`gen_ai.provider.name` of spans and metrics."""


_MAX_TRAIL_TOKENS = 512


@dataclass(slots=True)
class Trail:
    """The first tokens of an answer that may be audited; if it will be, with the log probabilities of its own path."""

    is_picked: bool
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        room = _MAX_TRAIL_TOKENS - len(self.token_ids)
        self.token_ids += token_ids[:room]
        if self.is_picked:
            self.logprobs += logprobs[:room]


@dataclass(slots=True)
class RequestRecord:
    """One call of GenerationService. Times are nanoseconds since 1970, by the server's clock."""

    request_id: str
    method: str
    """The full name, such as `dash_api.v1.GenerationService/Generate`."""
    seconds_left: float | None
    """Time from its beginning to its deadline."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The headers of W3C trace context: `traceparent`, `tracestate`."""
    trace_id: str = ""
    """In hexadecimal, set at the beginning; empty if tracing is off."""
    caller_span: SpanContext | None = None
    """The caller's span, read from `metadata` if tracing is on; None: it named none."""
    started_unix_ns: int = field(default_factory=time.time_ns)
    caller: Caller | None = None
    """None: the call was refused before its caller was known."""
    is_chat: bool = False
    wants_trace: bool = False
    model: str = ""
    """The model's name, once a model is loaded."""
    prepared: PreparedRequest | None = None
    """None: the call was refused before its request was read."""
    granted: SlotGranted | None = None
    """None: the call never had a slot."""
    granted_unix_ns: int | None = None
    queue_seconds: float = 0.0
    """Time until the slot, in the server and at the worker."""
    first_token_unix_ns: int | None = None
    """Time at which the first token was ready to be sent."""
    num_output_tokens: int = 0
    """Tokens handed to gRPC for the caller."""
    finished: SequenceFinished | None = None
    finish_reason: EndReason | None = None
    """None: the call did not end by itself."""
    prompt: list[tuple[str, str]] | None = None
    """Role and text of each message. A prompt that is no chat counts as one user message."""
    output: str | None = None
    """Prompt and output are set only if DASH_TRACE_CONTENT is on."""
    trail: Trail | None = None
    """Set if the answer may be audited."""
    ended_unix_ns: int | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str | None = None
    """The ErrorInfo's reason; None: the call did not fail with one."""

    @property
    def operation(self) -> str:
        """`gen_ai.operation.name` of spans and metrics."""
        return "chat" if self.is_chat else "text_completion"

    @property
    def seconds(self) -> float:
        """The call's duration. The call must be over."""
        assert self.ended_unix_ns is not None
        return (self.ended_unix_ns - self.started_unix_ns) / 1e9

    @property
    def is_picked(self) -> bool:
        """True if the answer will be audited."""
        return self.trail is not None and self.trail.is_picked

    def count_tokens(self, num_tokens: int) -> None:
        """Adds tokens that are about to be sent."""
        if num_tokens and self.first_token_unix_ns is None:
            self.first_token_unix_ns = time.time_ns()
        self.num_output_tokens += num_tokens


Observer = Callable[[RequestRecord], None]
"""Takes a call that begins or is over. Runs in the event loop: must be quick and must not raise."""

_SECONDS_ON_THE_WAY = 0.05
"""A client's deadline clock starts before the call arrives here. So it may cancel at the deadline a moment before
our own clock is there."""

CONTEXT_KEYS = ("traceparent", "tracestate")
"""The headers of W3C trace context."""


class RunningCall(Protocol):
    """A call as others see it: gRPC's context, or one generation of a session."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...
    def time_remaining(self) -> float | None: ...
    def auth_context(self) -> Mapping[str, Sequence[bytes]]: ...
    def peer(self) -> str: ...
    def add_done_callback(self, callback: Callable[[Any], None], /) -> None: ...


def record_of_call(request_id: str, method: str, call: RunningCall) -> RequestRecord:
    """Returns the record of a call that begins."""
    pairs: Sequence[tuple[str, str | bytes]] = call.invocation_metadata() or ()
    metadata = {key: value for key, value in pairs if key in CONTEXT_KEYS and isinstance(value, str)}
    return RequestRecord(request_id, method, call.time_remaining(), metadata)


@contextmanager
def observed(record: RequestRecord, call: RunningCall, observers: Sequence[Observer]) -> Iterator[None]:
    """Calls `observers` once, when the call is over.

    That is at the end of the block; or at the end of the call, if gRPC does not resume a cancelled handler.
    """
    with at_end_of_call(call, lambda: _end(record, _cut_off(record), None, observers)):
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.BaseError):
            raise
        except Exception as error:
            failure = failure_of(error, record.request_id)
            _end(record, failure.code, failure.reason, observers)
            raise
        _end(record, grpc.StatusCode.OK, None, observers)


@contextmanager
def at_end_of_call(call: RunningCall, function: Callable[[], None]) -> Iterator[None]:
    """Calls `function` at the end of the block; or at the end of the call, if gRPC does not resume a cancelled handler.

    gRPC leaves a call and its callbacks in a cycle, which may lie about for minutes. `function` is not part of it.
    """
    left = [function]

    def call_once(_: object = None) -> None:
        while left:
            left.pop()()

    call.add_done_callback(call_once)
    try:
        yield
    finally:
        call_once()


def _end(record: RequestRecord, code: grpc.StatusCode, reason: str | None, observers: Sequence[Observer]) -> None:
    if record.ended_unix_ns is not None:
        return
    record.ended_unix_ns, record.code, record.reason = time.time_ns(), code, reason
    for observer in observers:
        observer(record)


def _cut_off(record: RequestRecord) -> grpc.StatusCode:
    """Returns the status of a call that did not end by itself."""
    seconds = (time.time_ns() - record.started_unix_ns) / 1e9
    if record.seconds_left is not None and seconds >= record.seconds_left - _SECONDS_ON_THE_WAY:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED
