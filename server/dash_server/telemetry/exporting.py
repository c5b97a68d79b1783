"""Common parts of the export of spans and metrics: reads the OTEL_ variables, names the service, logs failures.

Knows no spans and no instruments. Imports the SDK only if something is exported, as the import takes 0.1 s.
"""

import logging
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

logger = logging.getLogger(__name__)

SERVICE_NAME = "dash-llm"

Signal = Literal["traces", "metrics"]

_EXPORTER_LOGGER = "opentelemetry.exporter.otlp.proto.grpc.exporter"
_MAX_WORDS = 300
# Spans and metrics name the same instance.
_INSTANCE_ID = str(uuid.uuid4())


def is_disabled(environment: Mapping[str, str]) -> bool:
    """True if OpenTelemetry is switched off."""
    return environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def is_exported(signal: Signal, environment: Mapping[str, str]) -> bool:
    """True if the signal goes to a collector: one is named, and the signal is not switched off."""
    upper = signal.upper()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{upper}_ENDPOINT")
    if is_disabled(environment) or not any(environment.get(name, "").strip() for name in endpoints):
        return False
    name = f"OTEL_{upper}_EXPORTER"
    value = environment.get(name, "").strip().lower()
    if value == "none":
        return False
    if value not in ("", "otlp"):
        logger.warning("%s: only otlp and none are known here, and not %r: it counts as otlp", name, value[:50])
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", f"OTEL_EXPORTER_OTLP_{upper}_PROTOCOL"):
        value = environment.get(name, "").strip().lower()
        if value not in ("", "grpc"):
            logger.warning("%s: only grpc is spoken here, and not %r: %s go by grpc", name, value[:50], signal)
    return True


def worker_resource(server: "Resource") -> "Resource":
    """Returns the resource of what the server's workers did, so that a page of a trace can tell the two apart."""
    from opentelemetry.sdk.resources import Resource

    name = str(server.attributes["service.name"])
    return server.merge(Resource({"service.name": f"{name}-worker"}))


def service_resource() -> "Resource":
    """Returns the resource that names this server. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own = {
        "service.name": SERVICE_NAME,
        "service.version": version("dash-llm"),
        "service.instance.id": _INSTANCE_ID,
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "opentelemetry",
        "telemetry.sdk.version": version("opentelemetry-sdk"),
    }
    # `Resource.create` would read the variables, and warn of them, once more.
    return Resource(own).merge(OTELResourceDetector().detect())


class _Words(threading.local):
    """The library's first log message about the attempt that this thread is making."""

    is_attempting = False
    first = ""


_words = _Words()


class ExportState:
    """Logs one line when exports begin to fail, and one when they work again.

    Inside `attempt`, it silences the library's exporter, which would log several lines at each attempt.
    """

    def __init__(self, signal: Signal) -> None:
        self._signal = signal
        self.is_failing = False
        exporter_logger = logging.getLogger(_EXPORTER_LOGGER)
        if not any(isinstance(known, _Overhear) for known in exporter_logger.filters):
            exporter_logger.addFilter(_Overhear())

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Surrounds an attempt. Call `tell` with its result afterwards."""
        _words.is_attempting, _words.first = True, ""
        try:
            yield
        finally:
            _words.is_attempting = False

    def tell(self, is_exported: bool) -> None:
        """Takes the result of an attempt, in the thread that made it."""
        if is_exported is not self.is_failing:
            return
        self.is_failing = not is_exported
        if is_exported:
            logger.info("%s are exported again", self._signal)
        else:
            logger.warning(
                "%s cannot be exported for now; requests are served all the same: %s", self._signal, _words.first
            )


class _Overhear(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not _words.is_attempting:
            return True
        _words.first = _words.first or " ".join(record.getMessage().split())[:_MAX_WORDS]
        return False
