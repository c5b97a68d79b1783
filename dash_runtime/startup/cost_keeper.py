"""Keeps the cost table true while an engine serves: by steps that it serves, and by steps that it measures when idle.

Knows a fit, a measurement and a clock. A callback gets each new table. Knows no files.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from dash_runtime.actions import CostTable
from dash_runtime.engine.cost_fit import CostFit, CostSpread, Drift, MeasuredCosts
from dash_runtime.engine.step_times import StepTime
from dash_runtime.events import CostStatus
from dash_runtime.progress import Progress

_EPOCH_SECONDS = 30.0
_SECONDS_BETWEEN_GROUPS = 0.1
"""To take in every served step would take 2 % of a token, and to know an epoch some twenty groups are enough."""
_JUDGED_GROUPS = 4
"""Groups of served steps between two judgements."""
_LEAST_ERROR = 0.02
"""A table stays if no plan that ran is off by more, as a share of a full-depth token."""
_LEAST_CERTAINTY = 3.0
"""Standard deviations that an error must have. It is asked often."""
_LEAST_SPREAD = 0.15
"""A good table may be off by this share: the memory speed that neighbours on a shared host leave moves it."""
_FIRST_ROUNDS = 10
_FIRST_PAUSE_SECONDS = 4.0
_LATER_PAUSE_SECONDS = 300.0
"""Idle rounds come often at first, and now and then for good: shares move with what else the machine does."""
_LEAST_PAUSE_PER_ROUND = 4.0
"""A pause lasts this times as long as its round did, so that an idle server takes a fifth of a core's time at most."""
_ABANDONED_AFTER_SECONDS = 1.0
"""A round is of use only if its plans run shortly after one another."""


class Measurement(Protocol):
    """Measures steps of all plans in rounds, one at a time; see `StepMeasurement`."""

    @property
    def is_between_rounds(self) -> bool: ...

    def step(self) -> list[StepTime] | None: ...

    def abandon(self) -> None: ...


class CostKeeper:
    """A `CostWatch`.

    Args:
        costs: the table in force.
        measurement: None to learn from served steps only.
        on_replace: gets every table that takes the place of the one before.
    """

    def __init__(
        self,
        costs: MeasuredCosts,
        measurement: Measurement | None,
        on_replace: Callable[[MeasuredCosts], None],
        progress: Progress,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.costs = costs
        self.status = CostStatus()
        self._measurement = measurement
        self._on_replace = on_replace
        self._progress = progress
        self._now = now
        self._drift = Drift()
        self._fit = self._new_fit()
        self._epoch_ends_at = now() + _EPOCH_SECONDS
        self._num_groups = 0
        self._next_group_at = now()
        self._num_rounds = 0
        self._round: list[StepTime] = []
        self._round_began_at = now()
        self._next_round_at = now() + _FIRST_PAUSE_SECONDS
        self._last_idle_at = now()

    def begin_with(self, costs: MeasuredCosts) -> None:
        """Takes a table that was just measured."""
        self.costs = costs
        self._fit = self._new_fit()

    def observe(self, step: StepTime) -> None:
        now = self._now()
        if now < self._next_group_at or not self._fit.add(step):
            return
        self._next_group_at = now + _SECONDS_BETWEEN_GROUPS
        if now >= self._epoch_ends_at:
            self._fit.end_epoch()
            self._epoch_ends_at = now + _EPOCH_SECONDS
        self._num_groups += 1
        if self._num_groups % _JUDGED_GROUPS == 0:
            self._judge()

    def seconds_until_idle_work(self) -> float:
        if self._measurement is None:
            return math.inf
        if not self._measurement.is_between_rounds:
            return 0.0
        return max(0.0, self._next_round_at - self._now())

    def work_idly(self) -> None:
        measurement, now = self._measurement, self._now()
        if measurement is None or self.seconds_until_idle_work() > 0:
            return
        if not measurement.is_between_rounds and now - self._last_idle_at > _ABANDONED_AFTER_SECONDS:
            measurement.abandon()
        if measurement.is_between_rounds:
            self._round, self._round_began_at = [], now
        self._round += measurement.step() or ()
        self._last_idle_at = self._now()
        if measurement.is_between_rounds:
            self._end_round()

    def _end_round(self) -> None:
        self._num_rounds += 1
        pause = _FIRST_PAUSE_SECONDS if self._num_rounds < _FIRST_ROUNDS else _LATER_PAUSE_SECONDS
        now = self._now()
        self._next_round_at = now + max(pause, _LEAST_PAUSE_PER_ROUND * (now - self._round_began_at))
        self._fit.add_round(self._round)
        self._epoch_ends_at = now + _EPOCH_SECONDS
        self._judge()

    def _judge(self) -> None:
        """Replaces the table if a plan that ran surely takes more or less than it says."""
        errors = self._fit.errors()
        sure = {source: error for source, (error, sd) in errors.items() if abs(error) > _LEAST_CERTAINTY * sd}
        worst = max(sure, key=lambda source: abs(sure[source]), default=None)
        if worst is None or abs(sure[worst]) < _LEAST_ERROR:
            error = 0.0 if worst is None else abs(sure[worst])
            self.status = CostStatus(self.status.num_replacements, round(error, 3))
            return
        before = self.costs.table
        table, spread = self._fit.estimate()
        self.costs = replace(
            self.costs, table=table, spread=spread, num_rounds=self._num_rounds, measured_at=time.time()
        )
        self.status = CostStatus(self.status.num_replacements + 1, 0.0)
        self._fit = self._new_fit()
        self._on_replace(self.costs)
        self._progress(
            f"the cost table is replaced: a token of {worst} takes {sure[worst]:+.3f} of a full-depth token beyond "
            f"what it said ({describe(before)}; now {describe(table)})"
        )

    def _new_fit(self) -> CostFit:
        table = self.costs.table
        return CostFit(table, self.costs.spread.at_least(CostSpread.around(table, _LEAST_SPREAD)), drift=self._drift)


def describe(costs: CostTable) -> str:
    """Returns the costs of a layer by action, as percentages of a full-depth token."""
    return ", ".join(f"{action.name} {100 * cost:.2f} %" for action, cost in costs.layer.items())
