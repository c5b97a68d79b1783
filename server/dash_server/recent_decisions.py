"""Keeps the decision traces of the latest requests, for the callers that made them.

Knows no gRPC messages, and keeps no prompts and no texts.
"""

from dataclasses import dataclass

from dash_runtime.config import Mode
from dash_runtime.decision_trace import DecisionTrace
from dash_server.request_record import RequestRecord
from dash_server.statuses import DecisionsNotFound


@dataclass(frozen=True, slots=True)
class KeptDecisions:
    """The decision trace of one request, with its owner, model and mode."""

    owner: str
    model: str
    mode: Mode
    decision_trace: DecisionTrace


class RecentDecisions:
    """Holds the decisions of the last `max_requests` requests."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._kept: dict[str, KeptDecisions] = {}
        """By request id, oldest first."""

    def keep(self, record: RequestRecord, decision_trace: DecisionTrace) -> None:
        """Keeps a request's decision trace, and drops the oldest if there are too many."""
        if record.caller is None or record.prepared is None:
            return
        mode = record.prepared.request.skip.mode
        self._kept[record.request_id] = KeptDecisions(record.caller.name, record.model, mode, decision_trace)
        while len(self._kept) > self._max_requests:
            del self._kept[next(iter(self._kept))]

    def get(self, request_id: str, caller_name: str) -> KeptDecisions:
        """Returns the decisions of one of the caller's own requests.

        Raises:
            DecisionsNotFound: they are not kept, or belong to another caller; the error does not tell which.
        """
        kept = self._kept.get(request_id)
        if kept is None or kept.owner != caller_name:
            raise DecisionsNotFound()
        return kept
