"""Decides when the tokens of a worker's steps leave: at once, or together with those of the next steps.

A message takes both sides the same processor time, however many tokens it has. So while many streams run and steps are
short, tokens wait for the next step's, if that is expected in time. All streams' tokens then leave together. Knows
outboxes and time; knows no connection to a worker and no callers.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from dash_runtime.events import EngineEvent
from dash_server.worker.outbox import Outbox

MIN_STREAMS = 4
"""Requests at a worker below which no token waits."""
_NEWEST_SHARE = 0.3


class Timer(Protocol):
    """A call that is to come, as `Clock.call_at` returns it."""

    def when(self) -> float: ...
    def cancel(self) -> None: ...


class Clock(Protocol):
    """The time of an event loop, and its calls at a time."""

    def time(self) -> float: ...
    def call_at(self, when: float, callback: Callable[[], object], /) -> Timer: ...


class Flush:
    """Puts the events of one worker's steps into outboxes. Call `begin_step`, `put` for each event, `end_step`."""

    def __init__(self, longest_seconds: float, clock: Clock | None = None) -> None:
        """No token waits longer than `longest_seconds`. `clock` is the running event loop's unless given."""
        self._longest_seconds = longest_seconds
        self._clock = clock
        self._began_at = -math.inf
        self._step_seconds = 2 * longest_seconds
        self._may_share = False
        self._waiting: list[Outbox] = []
        self._timer: Timer | None = None

    def begin_step(self, num_streams: int) -> None:
        """Takes note of a step, with so many requests at the worker."""
        self._clock = self._clock or asyncio.get_running_loop()
        now = self._clock.time()
        # A pause is no step, and must be forgotten within a few.
        seconds = min(now - self._began_at, 2 * self._longest_seconds)
        self._step_seconds += _NEWEST_SHARE * (seconds - self._step_seconds)
        self._began_at = now
        self._may_share = num_streams >= MIN_STREAMS and self._step_seconds < self._longest_seconds

    def put(self, outbox: Outbox, event: EngineEvent) -> None:
        """Puts an event of the step into its outbox."""
        if outbox.put(event, may_share=self._may_share):
            self._waiting.append(outbox)

    def end_step(self) -> None:
        """Lets the waiting tokens go, unless the next step is expected before the first of them has waited too long."""
        if not self._waiting:
            return
        assert self._clock is not None
        if self._timer is None:
            self._timer = self._clock.call_at(self._began_at + self._longest_seconds, self._release)
        if self._began_at + self._step_seconds > self._timer.when():
            self._release()

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        for outbox in waiting:
            outbox.release()
