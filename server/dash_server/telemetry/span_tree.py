"""Finished spans with explicit times, each inside its parent. Knows nothing of requests.

OpenTelemetry's own tracer would stamp, lock and copy each of thousands of spans; these are made when all is over.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

Attributes = dict[str, str | bool | int | float | Sequence[str]]

_SCOPE = InstrumentationScope("dash_server")
_UNSET = Status(StatusCode.UNSET)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class SharedResource(Resource):
    """A resource that many spans have. The exporter hashes it once for each of them, and it does not change."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(dict(resource.attributes), resource.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


@dataclass(frozen=True, slots=True)
class Times:
    """Of one span, in nanoseconds since 1970."""

    start: int
    end: int

    def around(self, start: int, end: int) -> "Times":
        """`start` to `end` as far as they lie within these times: clocks may differ, and work may outlast a call."""
        start = min(max(start, self.start), self.end)
        return Times(start, min(max(end, start), self.end))


@dataclass(frozen=True, slots=True)
class ParentSpan:
    """What a span's children need of it."""

    context: SpanContext
    times: Times


class SpanTree:
    """Makes the spans of one trace."""

    def __init__(self, trace_id: int, caller_span: SpanContext | None, resource: Resource) -> None:
        """`caller_span` is the parent of spans without one here."""
        self._trace_id = trace_id
        self._caller_span = caller_span
        self._resource = resource
        self._trace_state = caller_span.trace_state if caller_span is not None else TraceState()

    def span(
        self,
        name: str,
        parent: ParentSpan | None,
        start: int,
        end: int,
        attributes: Attributes,
        *,
        events: Sequence[Event] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status = _UNSET,
    ) -> tuple[ReadableSpan, ParentSpan]:
        """A span from `start` to `end`, cut to its parent's times."""
        times = Times(start, max(start, end)) if parent is None else parent.times.around(start, end)
        context = SpanContext(self._trace_id, _new_span_id(), False, _SAMPLED, self._trace_state)
        span = ReadableSpan(
            name,
            context,
            self._caller_span if parent is None else parent.context,
            self._resource,
            attributes,
            events,
            kind=kind,
            status=status,
            start_time=times.start,
            end_time=times.end,
            instrumentation_scope=_SCOPE,
        )
        return span, ParentSpan(context, times)


def _new_span_id() -> int:
    return random.getrandbits(64) or 1
