"""Logs to stderr, as lines for people or as JSON, with the ids of the current request and trace.

Records never carry prompts, outputs or anything else that a caller sent. Knows neither services nor spans.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime

request_id_of_task: ContextVar[str] = ContextVar("request_id_of_task", default="-")
trace_id_of_task: ContextVar[str] = ContextVar("trace_id_of_task", default="-")
"""In hexadecimal; "-" if nothing is traced."""

LOG_FORMAT_VARIABLE = "DASH_LOG_FORMAT"
JSON = "json"
CONSOLE = "console"

_NOTHING = "-"
_CONSOLE_LINE = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"
_CONSOLE_LINE_OF_A_WORKER = "worker: %(message)s"


class _IdsOfTask(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id_of_task.get()
        record.trace_id = trace_id_of_task.get()
        return True


class FewOfAKind(logging.Filter):
    """Lets a line come so many times a second, warnings aside: each call that is refused writes one. The next that
    comes says how many were left out."""

    def __init__(self, most: int = 50, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most = most
        self._clock = clock
        self._second = -1
        self._counts: Counter[tuple[str, str]] = Counter()
        self._left_out: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        kind, second = (record.name, str(record.msg)), int(self._clock())
        if second != self._second:
            self._second = second
            self._counts.clear()
        self._counts[kind] += 1
        if self._counts[kind] > self._most:
            self._left_out[kind] += 1
            return False
        if left_out := self._left_out.pop(kind, 0):
            record.msg, record.args = f"{record.getMessage()} (and {left_out} lines like it before)", ()
        return True


class _LibraryLines(logging.Filter):
    """Cuts OpenTelemetry's own records to one line: no traceback, and no header, which may be a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("opentelemetry."):
            if record.name == "opentelemetry.util.re":
                record.msg, record.args = "a header is not name=value, and is left out (OTEL_EXPORTER_OTLP_HEADERS)", ()
            if record.exc_info and record.exc_info[1] is not None:
                record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
            record.exc_info = record.exc_text = None
        return True


class _ConsoleFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        line = super().formatMessage(record)
        trace_id = getattr(record, "trace_id", _NOTHING)
        return line if trace_id == _NOTHING else f"{line} (trace {trace_id})"


class _JsonFormatter(logging.Formatter):
    """Writes one JSON object a line. Leaves out ids that are not set."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in ("request_id", "trace_id"):
            value = getattr(record, name, _NOTHING)
            if value != _NOTHING:
                fields[name] = value
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure_logging(level: str, log_format: str = CONSOLE) -> None:
    """Sends records of `level` and above to stderr."""
    _configure(level, log_format, _CONSOLE_LINE)


def configure_worker_logging() -> None:
    """Configures a worker process likewise. It reads the format from its environment, as its settings come later."""
    log_format = os.environ.get(LOG_FORMAT_VARIABLE, CONSOLE).lower()
    _configure("INFO", log_format, _CONSOLE_LINE_OF_A_WORKER)


def _configure(level: str, log_format: str, console_line: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_IdsOfTask())
    handler.addFilter(_LibraryLines())
    handler.addFilter(FewOfAKind())
    handler.setFormatter(_JsonFormatter() if log_format == JSON else _ConsoleFormatter(console_line))
    logging.basicConfig(level=level, handlers=[handler], force=True)
