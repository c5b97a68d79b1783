"""Times the decode steps of a single row, with what ran in each: the evidence for what an answer's tokens cost.

Knows a clock; knows no costs, no files and no tensors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dash_runtime.actions import Action
from dash_runtime.events import CostStatus


@dataclass(frozen=True, slots=True)
class StepTime:
    """A decode step of one row, and the seconds from its start to the next one's: all that its token took. Tokens that
    came together have equal shares."""

    source: str
    """The policy's name. Steps of one source cost about the same."""
    plan: bytes
    """One byte per layer: the action that ran."""
    head: Action
    num_evaluations: int
    """Evaluations of a learned policy."""
    num_positions: int
    """Positions that the row attended to."""
    seconds: float


class StepClock:
    """Tells `observe` about every step that the same request's next step follows at once."""

    def __init__(self, observe: Callable[[StepTime], None], now: Callable[[], float] = time.perf_counter) -> None:
        self._observe = observe
        self._now = now
        self._request_id: str | None = None
        self._started = 0.0
        self._work: list[tuple[str, bytes, Action, int, int]] = []

    def begin(self, request_id: str | None) -> None:
        """Begins a step of this request alone, or of none; completes the one before, if it was the same request's."""
        now = self._now()
        if request_id == self._request_id:
            for work in self._work:
                self._observe(StepTime(*work, (now - self._started) / len(self._work)))
        self._request_id, self._started, self._work = request_id, now, []

    def ran(self, source: str, plan: bytes, head: Action, num_evaluations: int, num_positions: int) -> None:
        """Says what the step that began last has run: a token, or one more. Says nothing of a step that was no
        request's alone."""
        if self._request_id is not None:
            self._work.append((source, plan, head, num_evaluations, num_positions))


class CostWatch(Protocol):
    """Keeps the cost table true while an engine serves."""

    @property
    def status(self) -> CostStatus: ...

    def observe(self, step: StepTime) -> None:
        """Adds a served step. It may replace the table."""

    def seconds_until_idle_work(self) -> float:
        """Returns how long an idle engine need not call `work_idly`."""

    def work_idly(self) -> None:
        """Measures one step, which takes no longer than a served one. To be called while no request is running."""
