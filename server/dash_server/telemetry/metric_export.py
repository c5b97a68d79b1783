"""Exports metrics to an OTLP collector, through a Prometheus endpoint, or both.

Imported only if one of them is set up. Both have their own threads: the event loop never waits for them. Knows no
instruments; `metrics` does.
"""

import logging
import threading
from typing import Any
from wsgiref.simple_server import WSGIServer

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from prometheus_client import CollectorRegistry, start_http_server

from dash_server.audit import Audit
from dash_server.listening import ListenError, is_loopback, try_to_bind
from dash_server.request_record import RequestRecord
from dash_server.settings import Settings
from dash_server.telemetry.exporting import ExportState, service_resource
from dash_server.telemetry.metrics import Metrics, Sources

logger = logging.getLogger(__name__)

# Time limit of the last export at shutdown; shorter if the collector did not respond before.
_LAST_EXPORT_SECONDS = 2.0
_LAST_ATTEMPT_SECONDS = 0.5


class MetricExport:
    """A running export of metrics. Call `close` at the end."""

    def __init__(self, metrics: Metrics, provider: MeterProvider, state: ExportState | None) -> None:
        self._metrics = metrics
        self._provider = provider
        self._state = state
        self._endpoint: WSGIServer | None = None
        self.port: int | None = None
        """Port of the Prometheus endpoint, if there is one."""

    def observe(self, record: RequestRecord) -> None:
        """Adds a call that is over."""
        self._metrics.observe(record)

    def observe_audit(self, audit: Audit, _: RequestRecord) -> None:
        """Adds a comparison with full depth."""
        self._metrics.observe_audit(audit)

    def serve(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Starts the Prometheus endpoint. The address must be free."""
        self._endpoint, _ = start_http_server(port, host, registry)
        self.port = self._endpoint.server_port
        logger.info("metrics are served on %s, port %d", host, self.port)

    def close(self) -> None:
        """Exports the last metrics. Blocks, for a bounded time."""
        if self._endpoint is not None:
            self._endpoint.shutdown()
            self._endpoint.server_close()
        is_failing = self._state is not None and self._state.is_failing
        try:
            self._provider.shutdown((_LAST_ATTEMPT_SECONDS if is_failing else _LAST_EXPORT_SECONDS) * 1000)
        except Exception as error:  # the library raises bare exceptions, which no longer matter
            logger.warning("the last metrics were not exported: %s", error)


def start_metrics(settings: Settings, sources: Sources, has_collector: bool) -> MetricExport | None:
    """Starts the Prometheus endpoint if its port is set, and the export to a collector if there is one.

    Returns None if there is neither, or only a collector with unusable variables.

    Raises:
        ListenError: the Prometheus endpoint may not or cannot listen on its address.
    """
    readers: list[MetricReader] = []
    registry = CollectorRegistry()  # the library's default registry is shared by all servers in a process
    if settings.metrics_port is not None:
        _check_address(settings)
        readers.append(PrometheusMetricReader(registry=registry))
    state, reader = None, None
    if has_collector:
        state = ExportState("metrics")
        reader = _otlp_reader(state)
        readers += [] if reader is None else [reader]
    if not readers:
        return None
    provider = MeterProvider(readers, service_resource(), shutdown_on_exit=False)
    export = MetricExport(Metrics(provider.get_meter("dash_server"), sources), provider, state)
    if settings.metrics_port is not None:
        export.serve(settings.metrics_host, settings.metrics_port, registry)
    if reader is not None:
        # Exports once now: a missing collector is reported at start instead of after a minute.
        threading.Thread(target=reader.collect, name="first-metrics", daemon=True).start()
    return export


def _check_address(settings: Settings) -> None:
    host, port = settings.metrics_host, settings.metrics_port
    assert port is not None
    try:
        addresses = try_to_bind(host, port)
    except OSError as error:
        raise ListenError(
            f"DASH_METRICS_PORT: cannot listen on {host}, port {port}: {error.strerror or error}"
        ) from None
    if not settings.allow_plaintext and not all(map(is_loopback, addresses)):
        raise ListenError(
            f"DASH_METRICS_HOST: other machines reach {host}, and the endpoint has neither TLS nor tokens; "
            "set DASH_ALLOW_PLAINTEXT=true if that is meant"
        )


def _otlp_reader(state: ExportState) -> PeriodicExportingMetricReader | None:
    try:
        return PeriodicExportingMetricReader(_AnnouncingExporter(state))
    except Exception as error:  # of many types, depending on the OTEL_ variables
        logger.warning("metrics are not exported, since an OTEL_ variable cannot be used: %s", error)
        return None


class _AnnouncingExporter(OTLPMetricExporter):
    """Reports the first failure, and the first success after it."""

    def __init__(self, state: ExportState) -> None:
        super().__init__()
        self._state = state

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        with self._state.attempt():
            result = super().export(metrics_data, timeout_millis, **kwargs)
        self._state.tell(result is MetricExportResult.SUCCESS)
        return result
