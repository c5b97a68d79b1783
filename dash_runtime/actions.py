"""Actions and their costs. Imports no torch: the server process uses this module too."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

from dash_runtime.errors import ConfigError


class Action(IntEnum):
    """One way to run a layer for a token, in ascending order of work.

    `dash_api.v1.Action` has other numbers: INT3 came last (`to_pb.py`).
    """

    SKIP = 1
    INT3 = 2
    INT4 = 3
    INT8 = 4
    FULL = 5


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured costs at one row, as shares of one full-depth decode token: FULL everywhere, or the highest action and
    head that there are where FULL is not offered.

    `layer[action]` is the cost of one layer, `head[precision]` the cost of the language-model head, and `fixed` the
    cost of the rest of a token (embedding, sampling). With the highest of each they add up to 1. `evaluation` is the
    cost of evaluating a learned policy once, which full depth never does.
    """

    num_layers: int
    layer: Mapping[Action, float]
    head: Mapping[Action, float]
    fixed: float = 0.0
    evaluation: float = 0.0

    def __post_init__(self) -> None:
        for name, costs in (("layer", self.layer), ("head", self.head)):
            if not set(costs) - {Action.SKIP}:
                raise ConfigError(f"cost_table.{name}", "has no cost for any kernel")
            if any(not 0 <= cost < float("inf") for cost in costs.values()):
                raise ConfigError(f"cost_table.{name}", "has a cost that is negative or not finite")
        if not 0 <= self.evaluation < float("inf"):
            raise ConfigError("cost_table.evaluation", "is negative or not finite")
        total = self.num_layers * self.layer[self.highest] + self.head[max(self.head)] + self.fixed
        if not 0.999 < total < 1.001:
            raise ConfigError("cost_table", f"adds up to {total:.4f} for the full-depth token, not to 1")

    @property
    def highest(self) -> Action:
        """The action of full depth."""
        return max(self.layer)

    @classmethod
    def from_seconds(
        cls,
        num_layers: int,
        layer: Mapping[Action, float],
        head: Mapping[Action, float],
        fixed: float = 0.0,
        evaluation: float = 0.0,
    ) -> "CostTable":
        """Makes the table from measured seconds of one layer, of the head, of the rest of a token, and of one
        evaluation."""
        total = num_layers * layer[max(layer)] + head[max(head)] + fixed
        return cls(
            num_layers,
            {action: seconds / total for action, seconds in layer.items()},
            {action: seconds / total for action, seconds in head.items()},
            fixed / total,
            evaluation / total,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return {
            "num_layers": self.num_layers,
            "layer": {action.name: cost for action, cost in self.layer.items()},
            "head": {precision.name: cost for precision, cost in self.head.items()},
            "fixed": self.fixed,
            "evaluation": self.evaluation,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "CostTable":
        """Returns the table that `to_json` described.

        Raises:
            ConfigError: the costs do not make a table.
            AttributeError, KeyError, TypeError, ValueError: `facts` is no such description.
        """
        layer, head = ({Action[name]: float(cost) for name, cost in facts[part].items()} for part in ("layer", "head"))
        evaluation = float(facts.get("evaluation", 0.0))
        return cls(int(facts["num_layers"]), layer, head, float(facts["fixed"]), evaluation)

    def token_cost(self, actions: Iterable[Action], head: Action, num_evaluations: int = 0) -> float:
        """Returns the cost of one token whose layers ran with `actions` and whose head ran in precision `head`, after
        so many evaluations of a policy."""
        layers = sum(self.layer[action] for action in actions)
        return layers + self.head[head] + self.fixed + num_evaluations * self.evaluation

    def mean_cost(self, counts: Mapping[Action, float], head: Action, num_evaluations: int = 0) -> float:
        """Returns the mean `token_cost` of tokens of which so many layers ran with each action in the mean."""
        layers = sum(count * self.layer[action] for action, count in counts.items() if count)
        return layers + self.token_cost((), head, num_evaluations)


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured seconds of one layer, for a group of rows with one action.

    `seconds[action][i]` is the time for `rows[i]` rows; `rows` ascends from 1.
    """

    rows: tuple[int, ...]
    seconds: Mapping[Action, tuple[float, ...]]
    split_seconds: float = 0.0
    """Seconds of each further group of a pass, beside its layer: rows are gathered, and put back in order."""

    def __post_init__(self) -> None:
        if not self.rows or self.rows[0] != 1 or any(more <= fewer for fewer, more in pairwise(self.rows)):
            raise ConfigError("latency_table.rows", f"{self.rows} does not ascend from 1")
        if not set(self.seconds) - {Action.SKIP}:
            raise ConfigError("latency_table.seconds", "has none for any kernel")
        if not 0 <= self.split_seconds < math.inf:
            raise ConfigError("latency_table.split_seconds", "is negative or not finite")
        for action, seconds in self.seconds.items():
            if len(seconds) != len(self.rows):
                raise ConfigError(
                    "latency_table.seconds",
                    f"has {len(seconds)} for {action.name}, not one per row count ({len(self.rows)})",
                )
            if any(not 0 <= cost < math.inf for cost in seconds):
                raise ConfigError("latency_table.seconds", f"has one for {action.name} that is negative or not finite")

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return {
            "rows": list(self.rows),
            "seconds": {action.name: list(seconds) for action, seconds in self.seconds.items()},
            "split_seconds": self.split_seconds,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "LatencyTable":
        """Returns the table that `to_json` described.

        Raises:
            ConfigError: the seconds do not make a table.
            AttributeError, KeyError, TypeError, ValueError: `facts` is no such description.
        """
        seconds = {Action[name]: tuple(float(cost) for cost in costs) for name, costs in facts["seconds"].items()}
        return cls(tuple(int(count) for count in facts["rows"]), seconds, float(facts["split_seconds"]))

    def least(self, other: "LatencyTable") -> "LatencyTable":
        """Returns the lesser seconds of this table and another one with the same rows and actions; this one, if the
        other has not the same."""
        if (self.rows, set(self.seconds)) != (other.rows, set(other.seconds)):
            return self
        seconds = {action: tuple(map(min, own, other.seconds[action])) for action, own in self.seconds.items()}
        return LatencyTable(self.rows, seconds, min(self.split_seconds, other.split_seconds))

    def cost(self, action: Action, num_rows: int) -> float:
        """Returns the seconds of one layer for `num_rows` rows with `action`, interpolated between measured row counts.

        Beyond the largest, the last line goes on if it rises. If noise made it fall, it is taken as level: no further
        row makes a group cheaper.
        """
        if num_rows == 0:
            return 0.0
        seconds = self.seconds[action]
        if len(self.rows) == 1:
            return seconds[0] * num_rows
        left = min(bisect_right(self.rows, num_rows), len(self.rows) - 1) - 1
        slope = (seconds[left + 1] - seconds[left]) / (self.rows[left + 1] - self.rows[left])
        if num_rows > self.rows[-1]:
            return seconds[-1] + max(0.0, slope) * (num_rows - self.rows[-1])
        return seconds[left] + slope * (num_rows - self.rows[left])
