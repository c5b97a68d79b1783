"""Makes the span of an audit, which joins the trace of the call whose answer it compares. Knows no exporter."""

from collections.abc import Iterator

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from dash_server.audit import Audit
from dash_server.request_record import RequestRecord
from dash_server.telemetry.span_tree import Attributes, SpanTree


class AuditSpan:
    """The span of one audit. Iterating makes it."""

    num_spans = 1

    def __init__(self, audit: Audit, record: RequestRecord, resource: Resource) -> None:
        self._audit = audit
        self._record = record
        self._resource = resource

    def __iter__(self) -> Iterator[ReadableSpan]:
        audit = self._audit
        attributes: Attributes = {
            "dash.request_id": audit.request_id,
            "dash.policy": audit.policy,
            "dash.audit.tokens": audit.num_tokens,
            "dash.audit.agreement": audit.agreement,
            "dash.audit.logprob_gap": audit.logprob_gap,
            "dash.audit.divergence": audit.divergence,
        }
        if audit.compute_budget is not None:
            attributes["dash.compute_budget"] = audit.compute_budget
        if audit.expected_divergence is not None:
            attributes["dash.audit.calibrated_divergence"] = audit.expected_divergence
        tree = SpanTree(int(self._record.trace_id, 16), self._record.caller_span, self._resource)
        span, _ = tree.span("audit", None, audit.started_unix_ns, audit.ended_unix_ns, attributes)
        yield span
