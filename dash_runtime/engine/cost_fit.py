"""Fits a cost table to what steps took: a ridge regression of log times on each step's work, towards a given table.

A machine's speed drifts with its neighbours, and an absolute time says little. So time is cut into *epochs*, each with
an unknown speed of its own, and only differences within an epoch count: plans that ran shortly after one another.
With u = work ÷ its cost by the table, log(seconds ÷ cost) = log speed + u·δ in first order, where δ is the correction
of the table; taking an epoch's mean from both sides removes the speed. Old epochs fade, since shares move as well:
those of the actions that read most go with the memory speed that the neighbours leave.

What is served comes in *runs*: one plan's steps, then another's, seconds later and perhaps at another speed. However
long a run, it is one observation, and how much runs of the same plan differ says how little one tells. What is measured
takes turns every few steps: there each group of steps is an observation.

Knows steps and tables; knows no decoder, no clock and no files.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.step_times import StepTime
from dash_runtime.errors import ConfigError

Vector = NDArray[np.floating]
Matrix = NDArray[np.floating]

GROUP = 8
"""Consecutive steps of one source that are taken together: the mean evens out work that only some steps do."""
STANDARD_POSITIONS = 256
"""The context at which a table holds. What attention takes beyond it is fitted apart."""
_LONGEST_OVER_MEDIAN = 1.5
"""Steps of a group that took longer than this times the group's median, by their cost, were disturbed."""
_NOISE = 0.03
"""Standard deviation of the log time of a group in a quiet epoch."""
_MOST_RUNS = 20
"""Evidence of an epoch that counts: what disturbs it disturbs more than one run."""
_FIRST_DRIFT, _FIRST_DRIFT_WEIGHT = 0.2, 2.0
"""Standard deviation of the log time between served runs of a plan before any were seen, and as how many it counts."""
_FIRST_SPREAD = 1.0
_LEAST = 1e-9
"""Anything smaller would be a mistake of a clock or of a table, and has no logarithm."""
_KEPT_SHARE = 0.9
"""Share of the evidence that is left after each further epoch: about ten epochs count."""
_KEPT_DRIFT = 0.95
"""Share of what runs said of the drift that is left after each further one: about twenty count."""
_LEAST_LAYER = 1e-6
"""Share of a token."""


@dataclass(frozen=True, slots=True)
class CostSpread:
    """Standard deviations of a table's entries, in the same unit."""

    layer: dict[Action, float]
    head: dict[Action, float]
    fixed: float
    evaluation: float

    @classmethod
    def around(cls, costs: CostTable, share: float) -> "CostSpread":
        """Returns spreads of that share of each entry, and a little more, since a small entry may be all wrong.

        Heads and the rest are held faster: how a constant part of every token divides among them is nothing that whole
        steps could tell.
        """
        layer = 0.2 * costs.layer[costs.highest]
        return cls(
            {action: share * (cost + layer) for action, cost in costs.layer.items()},
            {precision: 0.3 * share * cost for precision, cost in costs.head.items()},
            share * (0.3 * costs.fixed + 0.01),
            share * (costs.evaluation + layer),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads: the table's own layout."""
        return {
            "layer": {action.name: sd for action, sd in self.layer.items()},
            "head": {precision.name: sd for precision, sd in self.head.items()},
            "fixed": self.fixed,
            "evaluation": self.evaluation,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "CostSpread":
        """Returns what `to_json` described. Raises as `CostTable.from_json` does."""
        layer, head = ({Action[name]: float(sd) for name, sd in facts[part].items()} for part in ("layer", "head"))
        spread = cls(layer, head, float(facts["fixed"]), float(facts["evaluation"]))
        if not all(0 <= sd < math.inf for sd in (*layer.values(), *head.values(), spread.fixed, spread.evaluation)):
            raise ValueError("a spread that is negative or not finite")
        return spread

    def at_least(self, other: "CostSpread") -> "CostSpread":
        """Returns the larger of both, entry by entry."""
        return CostSpread(
            {action: max(sd, other.layer[action]) for action, sd in self.layer.items()},
            {precision: max(sd, other.head[precision]) for precision, sd in self.head.items()},
            max(self.fixed, other.fixed),
            max(self.evaluation, other.evaluation),
        )


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """A cost table with the spread of its entries, and how and when it was measured."""

    table: CostTable
    spread: CostSpread
    num_rounds: int
    """0 for a table that came from served steps."""
    measured_at: float
    """Seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads: the table's own description, and the rest beside it."""
        rest = {"spread": self.spread.to_json(), "num_rounds": self.num_rounds, "measured_at": self.measured_at}
        return self.table.to_json() | rest

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "MeasuredCosts":
        """Returns what `to_json` described. Raises as `CostTable.from_json` does."""
        table, spread = CostTable.from_json(facts), CostSpread.from_json(facts["spread"])
        if set(spread.layer) != set(table.layer) or set(spread.head) != set(table.head):
            raise ConfigError("cost_table.spread", "has other entries than the table")
        return cls(table, spread, int(facts["num_rounds"]), float(facts["measured_at"]))


class Drift:
    """A machine's drift: how much the log time of one plan differs from run to run, whatever table is in force."""

    def __init__(self) -> None:
        self._squares, self._weight = _FIRST_DRIFT_WEIGHT * _FIRST_DRIFT**2, _FIRST_DRIFT_WEIGHT

    @property
    def variance(self) -> float:
        return self._squares / self._weight

    def add(self, difference: float) -> None:
        """Counts the difference of two runs, each of which has the variance."""
        self._squares = _KEPT_DRIFT * self._squares + difference**2 / 2
        self._weight = _KEPT_DRIFT * self._weight + 1


class CostFit:
    """A running fit around one table. Its memory is a few matrices, whatever it has seen."""

    def __init__(
        self, costs: CostTable, spread: CostSpread, kept_share: float = _KEPT_SHARE, drift: Drift | None = None
    ) -> None:
        self.costs = costs
        self._drift = drift or Drift()
        self._kept_share = kept_share
        self._actions = list(costs.layer)
        self._heads = list(costs.head)
        self._table = np.array([*costs.layer.values(), *costs.head.values(), costs.fixed, costs.evaluation, 0.0])
        full = costs.layer[costs.highest]
        # The last entry is attention: per layer that runs and thousand positions beyond the standard context.
        spreads = [*spread.layer.values(), *spread.head.values(), spread.fixed, spread.evaluation, 0.3 * full]
        self._prior = np.diag(np.maximum(spreads, 1e-6) ** -2.0)
        facts = (costs.num_layers, max(costs.head), 0, STANDARD_POSITIONS)
        self._full_token = self._work(facts, {costs.highest: 1.0})
        size = len(self._table)
        self._evidence, self._answers = np.zeros((size, size)), np.zeros(size)
        self._group: list[StepTime] = []
        self._work_by_source: dict[str, Vector] = {}
        self._begin_epoch()

    def add(self, step: StepTime) -> bool:
        """Adds a served step. Returns True if a group is complete, so that the estimate has changed."""
        if self._group and self._group[0].source != step.source:
            self._group = []
        self._group.append(step)
        if len(self._group) < GROUP:
            return False
        self._add_group()
        self._group = []
        return True

    def add_round(self, steps: Iterable[StepTime]) -> None:
        """Adds steps of plans that were measured in turn, as an epoch of its own."""
        self.end_epoch()
        self._is_round = True
        for step in steps:
            self.add(step)
        self.end_epoch()

    def end_epoch(self) -> None:
        """Ends an epoch: what comes may run at another speed."""
        self._group = []
        self._end_run()
        if self._num_runs > 1:
            evidence, answers = self._epoch()
            self._evidence = self._kept_share * self._evidence + evidence
            self._answers = self._kept_share * self._answers + answers
        self._begin_epoch()

    def estimate(self) -> tuple[CostTable, CostSpread]:
        """Returns the table that fits best, and how well it is known."""
        delta, covariance = self._solve()
        lowest = np.zeros(len(self._table))
        # A tiny model's layers can vanish in noise, but others are told by them. So can a policy's evaluations, without
        # which a table would be one that was measured without a policy.
        lowest[: len(self._actions)] = _LEAST_LAYER
        if self.costs.evaluation > 0:
            lowest[-2] = _LEAST_LAYER
        table = np.maximum(self._table + delta, lowest)
        table /= self._full_token @ table
        # A scale of its own is none: spreads are those of the shares.
        to_shares = np.eye(len(table)) - np.outer(table, self._full_token)
        spreads = np.sqrt(np.maximum(np.diag(to_shares @ covariance @ to_shares.T), 0.0))
        layers = len(self._actions)
        costs = CostTable(
            self.costs.num_layers,
            dict(zip(self._actions, map(float, table), strict=False)),
            dict(zip(self._heads, map(float, table[layers:]), strict=False)),
            float(table[-3]),
            float(table[-2]),
        )
        spread = CostSpread(
            dict(zip(self._actions, map(float, spreads), strict=False)),
            dict(zip(self._heads, map(float, spreads[layers:]), strict=False)),
            float(spreads[-3]),
            float(spreads[-2]),
        )
        return costs, spread

    def errors(self) -> dict[str, tuple[float, float]]:
        """Returns by source what its tokens take beyond what the table says, and how surely: the standard deviation.

        Both as shares of a full-depth token, for plans that ran in this or recent epochs.
        """
        delta, covariance = self._solve()
        found: dict[str, tuple[float, float]] = {}
        for source, work in self._work_by_source.items():
            gradient = work - (work @ self._table) * self._full_token
            gradient[-1] = 0.0  # a table holds at the standard context
            found[source] = float(gradient @ delta), math.sqrt(max(0.0, float(gradient @ covariance @ gradient)))
        return found

    def _cost(self, step: StepTime) -> float:
        counts = {action: step.plan.count(action) for action in self._actions}
        return max(self.costs.mean_cost(counts, step.head, step.num_evaluations), _LEAST)

    def _work(self, of: tuple[int, Action, float, int], shares: dict[Action, float]) -> Vector:
        """Returns the work of a step: layers, head, evaluations and positions, its layers shared out so."""
        num_layers, head, num_evaluations, num_positions = of
        num_running = num_layers * (1 - shares.get(Action.SKIP, 0.0))
        return np.array(
            [
                *(num_layers * shares.get(action, 0.0) for action in self._actions),
                *(float(precision is head) for precision in self._heads),
                1.0,
                num_evaluations,
                num_running * (num_positions - STANDARD_POSITIONS) / 1000,
            ]
        )

    def _begin_epoch(self) -> None:
        size = len(self._table) + 1
        self._is_round = False
        self._num_runs = 0
        self._sums, self._products = np.zeros(size), np.zeros((size, size))
        self._run: list[Vector] = []
        """The groups of the run that is not over."""
        self._run_source = ""
        self._last_runs: dict[str, Vector] = {}

    def _add_group(self) -> None:
        ratios = [step.seconds / self._cost(step) for step in self._group]
        longest = _LONGEST_OVER_MEDIAN * statistics.median(ratios)
        kept = [step for step, ratio in zip(self._group, ratios, strict=True) if ratio <= longest]
        plans = b"".join(step.plan for step in kept)
        shares = {action: plans.count(action) / len(plans) for action in self._actions}
        head, num_evaluations = kept[0].head, sum(step.num_evaluations for step in kept) / len(kept)
        num_positions = sum(step.num_positions for step in kept) // len(kept)
        facts = (self.costs.num_layers, head, num_evaluations, num_positions)
        work = self._work(facts, shares)
        self._work_by_source[kept[0].source] = work
        cost = max(float(work @ self._table), _LEAST)
        log_time = math.log(max(sum(step.seconds for step in kept) / len(kept), _LEAST) / cost)
        if self._is_round or kept[0].source != self._run_source:
            self._end_run()
        self._run_source = kept[0].source
        self._run.append(np.append(work / cost, log_time))

    def _end_run(self) -> None:
        if not self._run:
            return
        mean = np.mean(self._run, axis=0)
        self._run = []
        if not self._is_round:
            if (before := self._last_runs.get(self._run_source)) is not None:
                delta, _ = self._solve()
                self._drift.add(float((mean - before) @ np.append(-delta, 1.0)))
            self._last_runs[self._run_source] = mean
        self._num_runs += 1
        self._sums += mean
        self._products += np.outer(mean, mean)

    def _epoch(self) -> tuple[Matrix, Vector]:
        """Returns what this epoch says so far: its differences, weighted by how quiet it was."""
        size, num_runs, sums, products = len(self._table), self._num_runs, self._sums, self._products
        if self._run:
            mean = np.mean(self._run, axis=0)
            num_runs, sums, products = num_runs + 1, sums + mean, products + np.outer(mean, mean)
        if num_runs < 2:
            return np.zeros((size, size)), np.zeros(size)
        scatter = products - np.outer(sums, sums) / num_runs
        squares, products, total = scatter[:-1, :-1], scatter[:-1, -1], scatter[-1, -1]
        fitted = np.linalg.solve(squares / _NOISE**2 + self._prior, products / _NOISE**2)
        left = max(0.0, total - 2 * fitted @ products + fitted @ squares @ fitted) / num_runs
        noise = max(_NOISE**2, left, 0.0 if self._is_round else self._drift.variance)
        weight = min(1.0, _MOST_RUNS / num_runs) / noise
        return weight * squares, weight * products

    def _solve(self) -> tuple[Vector, Matrix]:
        evidence, answers = self._epoch()
        covariance = np.linalg.inv(self._evidence + evidence + self._prior)
        return covariance @ (self._answers + answers), covariance


def fit_costs(guess: CostTable, rounds: Sequence[Sequence[StepTime]]) -> tuple[CostTable, CostSpread]:
    """Returns the table that fits all rounds alike, and its spread: from any guess, since it fits again around each
    result."""
    costs = guess
    for _ in range(5):
        fit = CostFit(costs, CostSpread.around(costs, _FIRST_SPREAD), kept_share=1.0)
        for steps in rounds:
            fit.add_round(steps)
        costs, spread = fit.estimate()
    return costs, spread
