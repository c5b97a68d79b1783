"""Decides which calls are traced: at the caller's wish, by chance, or because they were slow or failed.

Reads W3C trace context. Decides when a call is over, as only then its status and duration are known. Knows no spans and
no exporter.
"""

import random
from collections.abc import Mapping

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dash_server.request_record import RequestRecord

SERVER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""The statuses that OpenTelemetry's gRPC conventions call server errors. The others are the caller's fault."""

# The library warns of longer ones, so callers could fill the log.
_MAX_HEADER_CHARS = 512
_LOW_64_BITS = 2**64 - 1


def caller_span(metadata: Mapping[str, str]) -> SpanContext | None:
    """Returns the span that the caller names in W3C trace context; None if it names none, or an unreadable one."""
    headers = {key: value for key, value in metadata.items() if len(value) <= _MAX_HEADER_CHARS}
    # In a context of its own: what is current here is not the caller's.
    span = get_current_span(TraceContextTextMapPropagator().extract(headers, Context())).get_span_context()
    return span if span.is_valid else None


def new_trace_id() -> str:
    """Returns a random trace id in hexadecimal."""
    return f"{random.getrandbits(128) or 1:032x}"


class SamplingRule:
    """Chooses the calls to trace."""

    def __init__(self, ratio: float, slow_seconds: float | None) -> None:
        """Traces a share `ratio` of the calls whose callers do not decide, and all slower than `slow_seconds`."""
        self._bound = round(ratio * (_LOW_64_BITS + 1))
        self._slow_seconds = slow_seconds

    def is_sampled(self, record: RequestRecord) -> bool:
        """True if the call, which must be over, becomes a trace."""
        if record.code in SERVER_FAULTS or (self._slow_seconds is not None and record.seconds > self._slow_seconds):
            return True
        if record.caller is None:  # unknown callers may not fill the collector
            return False
        if record.wants_trace:
            return True
        if record.caller_span is not None:
            return record.caller_span.trace_flags.sampled
        # By the id's lower half, like OpenTelemetry's own samplers: all services choose the same traces.
        return int(record.trace_id, 16) & _LOW_64_BITS < self._bound
