"""Exports finished spans to a collector in a thread of its own. Nothing waits for it, and its memory is bounded.

Spans come as iterables. The thread makes them in small slices, so that the event loop gets the interpreter in between.
Knows no requests and no OTLP.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from dash_server.telemetry.exporting import ExportState

logger = logging.getLogger(__name__)

MAX_PENDING_SPANS = 50_000
# Each keeps its request's record, prompt tokens included.
MAX_PENDING_TREES = 256
# An exporter encodes a batch in one go: this many take about one of the interpreter's thread slices.
MAX_BATCH_SPANS = 128
_SLICE_SPANS = 16
_PAUSE_SECONDS = 0.0002
_FLUSH_SECONDS = 2.0
_LAST_SECONDS = 0.5


class SpanSource(Protocol):
    """Spans that are not made yet."""

    num_spans: int
    """An upper bound."""

    def __iter__(self) -> Iterator[ReadableSpan]: ...


class SpanExport:
    """The export thread and its queue. Call `put` from any thread, and `close` once."""

    def __init__(
        self,
        exporter: SpanExporter,
        state: ExportState,
        *,
        max_pending_spans: int = MAX_PENDING_SPANS,
        max_pending_trees: int = MAX_PENDING_TREES,
    ) -> None:
        self._exporter = exporter
        self._state = state
        self._max_pending_spans = max_pending_spans
        self._max_pending_trees = max_pending_trees
        self._pending: deque[SpanSource] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._is_full = False
        self._num_pending_spans = 0
        self._num_dropped = 0
        self._num_exported = 0

    @property
    def dropped_spans(self) -> int:
        """Spans that never reached the collector. Those never made count by their upper bound."""
        return self._num_dropped

    @property
    def exported_spans(self) -> int:
        """Spans that the collector took."""
        return self._num_exported

    def put(self, spans: SpanSource) -> None:
        """Queues spans to be made and exported, or drops them if too many wait."""
        with self._changed:
            if (
                self._is_closing
                or len(self._pending) >= self._max_pending_trees
                or self._num_pending_spans + spans.num_spans > self._max_pending_spans
            ):
                self._num_dropped += spans.num_spans
                is_news, self._is_full = not self._is_full and not self._is_closing, True
            else:
                is_news = False
                self._pending.append(spans)
                self._num_pending_spans += spans.num_spans
                self._start_thread()
                self._changed.notify()
        if is_news:
            logger.warning("more is traced than the collector takes: spans are dropped until it has caught up")

    def close(self, seconds: float = _FLUSH_SECONDS) -> None:
        """Exports waiting spans for at most about `seconds`, and drops the rest. Blocks."""
        with self._changed:
            self._is_closing = True
            if self._state.is_failing:
                self._drop_pending()
                seconds = 0.0
            self._changed.notify()
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        with self._changed:
            self._drop_pending()
        self._exporter.shutdown()  # also ends an export that waits for a retry
        if thread is not None:
            thread.join(_LAST_SECONDS)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
            self._thread.start()

    def _drop_pending(self) -> None:
        self._num_dropped += sum(spans.num_spans for spans in self._pending)
        self._num_pending_spans -= sum(spans.num_spans for spans in self._pending)
        self._pending.clear()

    def _run(self) -> None:
        batch: list[ReadableSpan] = []
        while True:
            with self._changed:
                spans = self._pending.popleft() if self._pending else None
            if spans is not None:
                batch = self._make(spans, batch)
                with self._changed:
                    self._num_pending_spans -= spans.num_spans
                continue
            self._export(batch)
            batch = []
            with self._changed:
                self._is_full = False
                if self._is_closing:
                    return
                if not self._pending:
                    self._changed.wait()

    def _make(self, spans: SpanSource, batch: list[ReadableSpan]) -> list[ReadableSpan]:
        """Makes spans, exports full batches, and returns the rest for the next batch."""
        num_made = 0
        try:
            for span in spans:
                batch.append(span)
                num_made += 1
                if num_made % _SLICE_SPANS == 0:
                    time.sleep(_PAUSE_SECONDS)
                if len(batch) == MAX_BATCH_SPANS:
                    self._export(batch)
                    batch = []
        except Exception:
            # An error in one call's spans must not end the thread.
            logger.exception("spans of a call could not be made")
            self._add_dropped(spans.num_spans - num_made)
        return batch

    def _export(self, batch: list[ReadableSpan]) -> None:
        if not batch:
            return
        try:
            with self._state.attempt():
                is_exported = self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception as error:
            is_exported = False
            logger.debug("spans were not exported: %s", error)
        if is_exported:
            self._num_exported += len(batch)
        else:
            self._add_dropped(len(batch))
        if not self._is_closing:
            self._state.tell(is_exported)

    def _add_dropped(self, num_spans: int) -> None:
        with self._changed:
            self._num_dropped += num_spans
