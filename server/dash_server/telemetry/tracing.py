"""Traces calls: gives each a trace id at its beginning, and samples it and exports its spans at its end.

Imported only if spans go to a collector. The event loop only samples; the thread of `span_export` makes the spans.
"""

import logging
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource

from dash_runtime.decision_trace import DecisionTrace
from dash_server.audit import Audit
from dash_server.request_record import RequestRecord
from dash_server.settings import Settings
from dash_server.telemetry.audit_span import AuditSpan
from dash_server.telemetry.call_spans import CallSpans
from dash_server.telemetry.exporting import ExportState, service_resource, worker_resource
from dash_server.telemetry.span_export import SpanExport
from dash_server.telemetry.span_tree import SharedResource
from dash_server.telemetry.token_spans import SpanOptions
from dash_server.telemetry.trace_sampling import SamplingRule, caller_span, new_trace_id

logger = logging.getLogger(__name__)

_SAMPLER = "OTEL_TRACES_SAMPLER"
_SAMPLER_ARGUMENT = "OTEL_TRACES_SAMPLER_ARG"


class Tracing:
    """Traces the calls of one server. Call `begin` and `finish` in the event loop."""

    def __init__(self, rule: SamplingRule, options: SpanOptions, resource: Resource, export: SpanExport) -> None:
        self._rule = rule
        self._options = options
        self._resource = SharedResource(resource)
        self._worker_resource = SharedResource(worker_resource(resource))
        self.export = export

    def begin(self, record: RequestRecord) -> None:
        """Gives a call its trace id: the caller's, if it sent one."""
        record.caller_span = caller_span(record.metadata)
        span = record.caller_span
        record.trace_id = new_trace_id() if span is None else f"{span.trace_id:032x}"

    def finish(self, record: RequestRecord, decision_trace: DecisionTrace | None) -> None:
        """Traces a call that is over, if the sampling rule chooses it."""
        if self._rule.is_sampled(record):
            self.export.put(CallSpans(record, decision_trace, self._options, self._resource, self._worker_resource))

    def audited(self, audit: Audit, record: RequestRecord) -> None:
        """Traces the comparison of a traced call's answer with full depth."""
        if self._rule.is_sampled(record):
            self.export.put(AuditSpan(audit, record, self._resource))

    def close(self) -> None:
        """Exports the last spans. Blocks, for a bounded time."""
        self.export.close()


def start_tracing(settings: Settings, environment: Mapping[str, str]) -> Tracing | None:
    """Starts tracing to the collector in the OTEL_ variables. Returns None if they cannot be used."""
    state = ExportState("traces")
    try:
        with state.attempt():  # the library logs whole tracebacks, say of missing certificates
            exporter = OTLPSpanExporter()
    except Exception as error:  # of many types, depending on the OTEL_ variables
        logger.warning("traces are not exported, since an OTEL_ variable cannot be used: %s", error)
        return None
    rule = SamplingRule(trace_ratio(settings, environment), settings.trace_slow_seconds)
    options = SpanOptions(settings.trace_layers, settings.trace_content)
    return Tracing(rule, options, service_resource(), SpanExport(exporter, state))


def trace_ratio(settings: Settings, environment: Mapping[str, str]) -> float:
    """Returns the share of calls traced by chance: from the setting, else the OTEL_ variables, else 0."""
    if settings.trace_ratio is not None:
        return settings.trace_ratio
    sampler = environment.get(_SAMPLER, "").strip().lower().removeprefix("parentbased_")
    match sampler:
        case "" | "always_off":
            return 0.0
        case "always_on":
            return 1.0
        case "traceidratio":
            argument = environment.get(_SAMPLER_ARGUMENT, "").strip() or "1"
            try:
                ratio = float(argument)
            except ValueError:
                ratio = -1.0
            if 0 <= ratio <= 1:
                return ratio
            logger.warning("%s: must be a number from 0 to 1, got %r; it counts as 0", _SAMPLER_ARGUMENT, argument[:50])
            return 0.0
        case _:
            logger.warning("%s: %r is not known here and counts as always_off", _SAMPLER, sampler[:50])
            return 0.0
