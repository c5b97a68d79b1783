"""Brings together what the server learned of a call and what its worker recorded of it, which come at two times.

The worker's part comes just before a request's end, or some milliseconds after it was cancelled. Knows neither spans
nor callers.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from dash_runtime.recorded import RecordedRequest
from dash_server.request_record import RequestRecord

WAIT_SECONDS = 2.0


@dataclass(slots=True)
class _Open:
    record: RequestRecord
    decision_trace: RecordedRequest | None = None


class PendingTraces:
    """Told of calls and of recordings, in the event loop."""

    def __init__(
        self,
        on_decision_trace: Callable[[RequestRecord, RecordedRequest], None],
        on_complete: Callable[[RequestRecord, RecordedRequest | None], None],
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Tells of a recording as soon as it is there, and of each call once it is over, with its recording if it has
        come within `wait_seconds` of the call's end."""
        self._on_decision_trace = on_decision_trace
        self._on_complete = on_complete
        self._wait_seconds = wait_seconds
        self._open: dict[str, _Open] = {}

    def begin(self, record: RequestRecord) -> None:
        """A call begins."""
        self._open[record.request_id] = _Open(record)

    def add(self, decision_trace: RecordedRequest) -> None:
        """The worker says what it recorded of a request."""
        call = self._open.get(decision_trace.request_id)
        if call is None or call.decision_trace is not None:
            return
        call.decision_trace = decision_trace
        self._on_decision_trace(call.record, decision_trace)
        if call.record.ended_unix_ns is not None:
            self._complete(decision_trace.request_id)

    def end(self, record: RequestRecord) -> None:
        """A call is over."""
        call = self._open.get(record.request_id)
        if call is None:
            return
        # One without a slot was not with a worker, or not for long enough to have anything recorded.
        if call.decision_trace is not None or record.granted is None:
            self._complete(record.request_id)
        else:
            asyncio.get_running_loop().call_later(self._wait_seconds, self._complete, record.request_id)

    def _complete(self, request_id: str) -> None:
        call = self._open.pop(request_id, None)
        if call is not None:
            self._on_complete(call.record, call.decision_trace)

    def close(self) -> None:
        """Waits no longer for recordings of calls that are over."""
        for request_id, call in list(self._open.items()):
            if call.record.ended_unix_ns is not None:
                self._complete(request_id)
