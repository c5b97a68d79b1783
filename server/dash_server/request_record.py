"""What the server learns of one generation call, from its beginning to its end, for whoever observes calls.

Filled in by the service and the generation on the call's way; spans, metrics and kept decisions are made of it once
it is over. Never holds a prompt or an output unless a setting asks for them.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.trace import SpanContext

from dash_server.auth import Caller
from dash_server.from_pb import PreparedRequest
from dash_server.statuses import failure_of
from dash_server.worker.messages import Finished, Granted

PROVIDER_NAME = "dash"
"""`gen_ai.provider.name` of spans and metrics."""


@dataclass(slots=True)
class RequestRecord:
    """One call of GenerationService. Times are nanoseconds since 1970, by the server's clock."""

    request_id: str
    method: str
    """In full: `dash_api.v1.GenerationService/Generate`."""
    seconds_left: float | None
    """Until its deadline, when it began."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of W3C trace context: `traceparent`, `tracestate`."""
    trace_id: str = ""
    """In hexadecimal, from its beginning on; empty where nothing is traced."""
    caller_span: SpanContext | None = None
    """The caller's, read from `metadata` where anything is traced; None: it named none."""
    started_unix_ns: int = field(default_factory=time.time_ns)
    caller: Caller | None = None
    """None: it was refused before anybody knew who called."""
    is_chat: bool = False
    wants_trace: bool = False
    model: str = ""
    """The model's name, once there is one."""
    prepared: PreparedRequest | None = None
    """None: it was refused before, or is not a request at all."""
    granted: Granted | None = None
    """None: it never had a slot."""
    granted_unix_ns: int | None = None
    queue_seconds: float = 0.0
    """Until it had its slot, here and at the worker."""
    first_token_unix_ns: int | None = None
    """When its first token was there to be sent."""
    num_output_tokens: int = 0
    """Given to the caller, as far as one can know."""
    finished: Finished | None = None
    finish_reason: str | None = None
    """`end_of_sequence`, `stop_token`, `stop_string` or `length`; None: it did not end by itself."""
    prompt: list[tuple[str, str]] | None = None
    """Role and text of each message; a prompt that is no conversation is the user's only one."""
    output: str | None = None
    """Both only where DASH_TRACE_CONTENT asks for them."""
    ended_unix_ns: int | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str | None = None
    """The ErrorInfo's, where the call failed for one."""

    @property
    def operation(self) -> str:
        """`gen_ai.operation.name` of spans and metrics."""
        return "chat" if self.is_chat else "text_completion"

    @property
    def seconds(self) -> float:
        """From its beginning to its end, which is past."""
        assert self.ended_unix_ns is not None
        return (self.ended_unix_ns - self.started_unix_ns) / 1e9

    def count_tokens(self, num_tokens: int) -> None:
        """So many more tokens are about to be sent."""
        if num_tokens and self.first_token_unix_ns is None:
            self.first_token_unix_ns = time.time_ns()
        self.num_output_tokens += num_tokens


Observer = Callable[[RequestRecord], None]
"""Told of a call that begins or is over, in the event loop: must be quick and must not raise."""

_SECONDS_ON_THE_WAY = 0.05
"""A client's clock runs from before its call is on its way. At its deadline it cancels the call, and on a busy machine
that is known here before our own clock is at the deadline."""

_CONTEXT_KEYS = ("traceparent", "tracestate")


def record_of_call(request_id: str, method: str, context: grpc.aio.ServicerContext) -> RequestRecord:
    """The record of a call that begins."""
    pairs: Sequence[tuple[str, str | bytes]] = context.invocation_metadata() or ()
    metadata = {key: value for key, value in pairs if key in _CONTEXT_KEYS and isinstance(value, str)}
    return RequestRecord(request_id, method, context.time_remaining(), metadata)


@contextmanager
def observed(record: RequestRecord, context: grpc.aio.ServicerContext, observers: Sequence[Observer]) -> Iterator[None]:
    """Tells `observers` once, when the call is over: at the end of the block, or with the call where a handler is not
    resumed after a cancellation."""
    context.add_done_callback(lambda _: _end(record, _cut_off(record), None, observers))
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit, grpc.aio.BaseError):
        _end(record, _cut_off(record), None, observers)
        raise
    except Exception as error:
        failure = failure_of(error, record.request_id)
        _end(record, failure.code, failure.reason, observers)
        raise
    _end(record, grpc.StatusCode.OK, None, observers)


def _end(record: RequestRecord, code: grpc.StatusCode, reason: str | None, observers: Sequence[Observer]) -> None:
    if record.ended_unix_ns is not None:
        return
    record.ended_unix_ns, record.code, record.reason = time.time_ns(), code, reason
    for observer in observers:
        observer(record)


def _cut_off(record: RequestRecord) -> grpc.StatusCode:
    """Why a call ended that did not end by itself."""
    seconds = (time.time_ns() - record.started_unix_ns) / 1e9
    if record.seconds_left is not None and seconds >= record.seconds_left - _SECONDS_ON_THE_WAY:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED
