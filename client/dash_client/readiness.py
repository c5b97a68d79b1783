"""Decides how long to wait for a server, and the error in the end. Shared by both clients, which do the waiting."""

import time

from dash_client import checks
from dash_client.calls import FACTS_TIMEOUT_SECONDS
from dash_client.errors import DashError, UnavailableError
from dash_client.types import HealthStatus

_PAUSE_SECONDS = 0.2


class Readiness:
    """One wait for a server; takes the result of each health check."""

    def __init__(self, target: str, timeout: float | None) -> None:
        self._target = target
        self._timeout = checks.timeout(timeout, None)
        self._end = None if self._timeout is None else time.monotonic() + self._timeout
        self._state = f"no server at {target}"

    def next_timeout(self) -> float:
        """Returns the timeout in seconds for the next health check.

        Raises:
            UnavailableError: the time is over; the message names the server's last state.
        """
        left = self._left()
        if left <= 0:
            raise UnavailableError(f"not ready after {self._timeout:g} s: {self._state}", code="UNAVAILABLE")
        return min(left, FACTS_TIMEOUT_SECONDS)

    def saw(self, status: HealthStatus) -> bool:
        """Takes a status; returns True if the wait is over."""
        self._state = f"the server at {self._target} says {status.name}"
        return status is HealthStatus.SERVING

    def failed(self, error: DashError) -> None:
        """Takes the error of a health check."""
        self._state = error.message

    def pause(self) -> float:
        """Returns the seconds until the next health check."""
        return min(_PAUSE_SECONDS, max(0.0, self._left()))

    def _left(self) -> float:
        return FACTS_TIMEOUT_SECONDS if self._end is None else self._end - time.monotonic()
