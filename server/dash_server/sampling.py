"""Which calls are traced: at the caller's word, by chance, or because they were slow or failed.

Reads W3C trace context. Knows no spans and no exporter; decides when a call is over, since only then it is known how
it went.
"""

import logging
import random
import re
from collections.abc import Mapping

import grpc
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from dash_server.request_record import RequestRecord

logger = logging.getLogger(__name__)

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
"""Those that the gRPC conventions call errors of a server. The others are the caller's: wrong, too many, or gone."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACESTATE_CHARS = 512
_LOW_64_BITS = 2**64 - 1


def caller_span(metadata: Mapping[str, str]) -> SpanContext | None:
    """The span that the caller names as its own; None where it names none, or nothing that can be read."""
    traceparent = metadata.get("traceparent")
    if traceparent is None:
        return None
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    if match is None:
        logger.debug("a traceparent that cannot be read is ignored")
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    is_valid = version != "ff" and int(trace_id, 16) and int(span_id, 16) and not (version == "00" and rest)
    if not is_valid:
        logger.debug("a traceparent that is not valid is ignored")
        return None
    tracestate = metadata.get("tracestate", "")
    state = TraceState.from_header([tracestate]) if len(tracestate) <= _MAX_TRACESTATE_CHARS else TraceState()
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16) & 1), state)


def new_trace_id() -> str:
    """In hexadecimal."""
    return f"{random.getrandbits(128) or 1:032x}"


class SamplingRule:
    """Whether a call that is over is traced."""

    def __init__(self, ratio: float, slow_seconds: float | None) -> None:
        """`ratio` is the share of calls whose callers say neither yes nor no; slower ones are traced in any case."""
        self._bound = round(ratio * (_LOW_64_BITS + 1))
        self._slow_seconds = slow_seconds

    def is_sampled(self, record: RequestRecord) -> bool:
        """Whether `record`, which is over, becomes a trace."""
        if record.code in SERVER_FAULTS or (self._slow_seconds is not None and record.seconds > self._slow_seconds):
            return True
        if record.caller is None:  # whoever may not call may not fill a collector either
            return False
        if record.wants_trace:
            return True
        if record.caller_span is not None:
            return record.caller_span.trace_flags.sampled
        # By the id's lower half, as OpenTelemetry's own samplers do: all services choose the same ones.
        return int(record.trace_id, 16) & _LOW_64_BITS < self._bound
