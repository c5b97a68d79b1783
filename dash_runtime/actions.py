"""Actions, and what they cost. Imports no torch: the server process uses this module too."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from dash_runtime.errors import ConfigError


class Action(IntEnum):
    """What is done with one layer for one token, in ascending order of work.

    The numbers are those of `dash_api.v1.Action`, and the byte values of returned decisions.
    """

    SKIP = 1
    INT4 = 2
    INT8 = 3
    FULL = 4


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured costs at one row, as shares of one full-depth (FULL everywhere) decode token.

    `layer[action]` is the cost of one layer, `head[precision]` that of the language-model head, `fixed`
    of whatever every token pays (embedding, sampling). `num_layers * layer[FULL] + head[FULL] + fixed`
    is 1.
    """

    num_layers: int
    layer: Mapping[Action, float]
    head: Mapping[Action, float]
    fixed: float = 0.0

    def __post_init__(self) -> None:
        for name, costs in (("layer", self.layer), ("head", self.head)):
            if Action.FULL not in costs:
                raise ConfigError(f"cost_table.{name}", "has no cost for FULL")
            if any(not 0 <= cost < float("inf") for cost in costs.values()):
                raise ConfigError(f"cost_table.{name}", "has a cost that is negative or not finite")
        total = self.num_layers * self.layer[Action.FULL] + self.head[Action.FULL] + self.fixed
        if not 0.999 < total < 1.001:
            raise ConfigError("cost_table", f"adds up to {total:.4f} for the full-depth token, not to 1")

    @classmethod
    def from_seconds(
        cls,
        num_layers: int,
        layer: Mapping[Action, float],
        head: Mapping[Action, float],
        fixed: float = 0.0,
    ) -> "CostTable":
        """The table for measured seconds of one layer, of the head, and of the rest of a token."""
        total = num_layers * layer[Action.FULL] + head[Action.FULL] + fixed
        return cls(
            num_layers,
            {action: seconds / total for action, seconds in layer.items()},
            {action: seconds / total for action, seconds in head.items()},
            fixed / total,
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "num_layers": self.num_layers,
            "layer": {action.name: cost for action, cost in self.layer.items()},
            "head": {precision.name: cost for precision, cost in self.head.items()},
            "fixed": self.fixed,
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "CostTable":
        """The table that `to_json` described.

        Raises:
            ConfigError: the costs do not make a table.
            AttributeError, KeyError, TypeError, ValueError: it is no such description.
        """
        layer, head = ({Action[name]: float(cost) for name, cost in facts[part].items()} for part in ("layer", "head"))
        return cls(int(facts["num_layers"]), layer, head, float(facts["fixed"]))

    def token_cost(self, actions: "list[Action] | tuple[Action, ...]", head: Action) -> float:
        """The cost of one token whose layers ran with `actions` and whose head ran in `head`."""
        return sum(self.layer[action] for action in actions) + self.head[head] + self.fixed
