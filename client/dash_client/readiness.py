"""Waiting for a server: how long to go on, and what to say at the end. Shared by both clients; waits for nothing."""

import time

from dash_client import checks
from dash_client.calls import FACTS_TIMEOUT_SECONDS
from dash_client.errors import DashError, UnavailableError
from dash_client.types import HealthStatus

_PAUSE_SECONDS = 0.2


class Readiness:
    """One wait, told of each look at the server's health."""

    def __init__(self, target: str, timeout: float | None) -> None:
        self._target = target
        self._timeout = checks.timeout(timeout, None)
        self._end = None if self._timeout is None else time.monotonic() + self._timeout
        self._state = f"no server at {target}"

    def next_timeout(self) -> float:
        """For the next look.

        Raises:
            UnavailableError: the time is over; says what the server did instead.
        """
        left = self._left()
        if left <= 0:
            raise UnavailableError(f"not ready after {self._timeout:g} s: {self._state}", code="UNAVAILABLE")
        return min(left, FACTS_TIMEOUT_SECONDS)

    def saw(self, status: HealthStatus) -> bool:
        """Whether this is the end of the wait."""
        self._state = f"the server at {self._target} says {status.name}"
        return status is HealthStatus.SERVING

    def failed(self, error: DashError) -> None:
        """A look that found no server."""
        self._state = error.message

    def pause(self) -> float:
        """Seconds until the next look."""
        return min(_PAUSE_SECONDS, max(0.0, self._left()))

    def _left(self) -> float:
        return FACTS_TIMEOUT_SECONDS if self._end is None else self._end - time.monotonic()
