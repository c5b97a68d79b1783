"""Makes finished spans with explicit times, each inside its parent. Knows no requests.

OpenTelemetry's own tracer would stamp, lock and copy each of thousands of spans. These are made when the call is over.
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
    """A resource with a cached hash: the exporter hashes it for each span, and it never changes."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(dict(resource.attributes), resource.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


@dataclass(frozen=True, slots=True)
class Times:
    """A span's start and end, in nanoseconds since 1970."""

    start: int
    end: int

    def around(self, start: int, end: int) -> "Times":
        """Cuts `start` to `end` to these times: clocks may differ, and work may outlast its call."""
        start = min(max(start, self.start), self.end)
        return Times(start, min(max(end, start), self.end))


@dataclass(frozen=True, slots=True)
class ParentSpan:
    """The part of a span that its children need."""

    context: SpanContext
    times: Times


class SpanTree:
    """Makes the spans of one trace."""

    def __init__(self, trace_id: int, caller_span: SpanContext | None, resource: Resource) -> None:
        """`caller_span` is the parent of spans that have none in the tree."""
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
        """Makes a span from `start` to `end`, cut to its parent's times."""
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
