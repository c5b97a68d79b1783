"""What was recorded of the latest requests, for the callers that made them.

Knows no messages of gRPC, and keeps nothing but what the worker recorded: no prompts and no texts.
"""

from dataclasses import dataclass

from dash_runtime.config import Mode
from dash_runtime.recorded import RecordedRequest
from dash_server.request_record import RequestRecord
from dash_server.statuses import DecisionsNotFound


@dataclass(frozen=True, slots=True)
class KeptDecisions:
    """What was recorded of one request, with what else its caller may know of it."""

    owner: str
    model: str
    mode: Mode
    decision_trace: RecordedRequest


class RecentDecisions:
    """Holds those of the last requests, up to a number of them."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._kept: dict[str, KeptDecisions] = {}
        """By request id, oldest first."""

    def keep(self, record: RequestRecord, decision_trace: RecordedRequest) -> None:
        """Takes in what was recorded of a request, and lets the oldest go where there are too many."""
        if record.caller is None or record.prepared is None:
            return
        mode = record.prepared.request.skip.mode
        self._kept[record.request_id] = KeptDecisions(record.caller.name, record.model, mode, decision_trace)
        while len(self._kept) > self._max_requests:
            del self._kept[next(iter(self._kept))]

    def get(self, request_id: str, caller_name: str) -> KeptDecisions:
        """Those of a request that the caller made itself.

        Raises:
            DecisionsNotFound: they are not held, or somebody else's; nobody can tell which.
        """
        kept = self._kept.get(request_id)
        if kept is None or kept.owner != caller_name:
            raise DecisionsNotFound()
        return kept
