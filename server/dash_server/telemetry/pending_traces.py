"""Joins a call's record from the server with its decision trace from the worker.

The decision trace comes just before a request's end, or milliseconds after its cancellation. Knows no spans and no
callers.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from dash_runtime.decision_trace import DecisionTrace
from dash_server.request_record import RequestRecord

WAIT_SECONDS = 2.0


@dataclass(slots=True)
class _Open:
    record: RequestRecord
    decision_trace: DecisionTrace | None = None


class PendingTraces:
    """The calls whose record or decision trace is still to come. Used in the event loop only."""

    def __init__(
        self,
        on_decision_trace: Callable[[RequestRecord, DecisionTrace], None],
        on_complete: Callable[[RequestRecord, DecisionTrace | None], None],
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Sets the callbacks.

        `on_decision_trace` gets each decision trace at once. `on_complete` gets each call that is over, with its
        decision trace, or None if none came within `wait_seconds` of the call's end.
        """
        self._on_decision_trace = on_decision_trace
        self._on_complete = on_complete
        self._wait_seconds = wait_seconds
        self._open: dict[str, _Open] = {}

    def begin(self, record: RequestRecord) -> None:
        """Adds a call that begins."""
        self._open[record.request_id] = _Open(record)

    def add(self, decision_trace: DecisionTrace) -> None:
        """Takes a worker's decision trace."""
        call = self._open.get(decision_trace.request_id)
        if call is None or call.decision_trace is not None:
            return
        call.decision_trace = decision_trace
        self._on_decision_trace(call.record, decision_trace)
        if call.record.ended_unix_ns is not None:
            self._complete(decision_trace.request_id)

    def end(self, record: RequestRecord) -> None:
        """Takes a call that is over."""
        call = self._open.get(record.request_id)
        if call is None:
            return
        # A call without a slot has no decision trace.
        if call.decision_trace is not None or record.granted is None:
            self._complete(record.request_id)
        else:
            asyncio.get_running_loop().call_later(self._wait_seconds, self._complete, record.request_id)

    def _complete(self, request_id: str) -> None:
        call = self._open.pop(request_id, None)
        if call is not None:
            self._on_complete(call.record, call.decision_trace)

    def close(self) -> None:
        """Completes the calls that are over, without waiting for their decision traces."""
        for request_id, call in list(self._open.items()):
            if call.record.ended_unix_ns is not None:
                self._complete(request_id)
