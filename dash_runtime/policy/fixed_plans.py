"""Fixed plans with what they were measured to do: the same actions for every token, in any layer, edges included.

Knows actions and names; knows no search and no files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dash_runtime.actions import Action, CostTable
from dash_runtime.errors import ConfigError
from dash_runtime.policy.pareto import undominated
from dash_runtime.policy.policy import FULL_DEPTH_NAME, Actions, fixed_head

_MAX_DIVERGENCE = 1e3
_LETTERS = {Action.SKIP: ".", Action.INT3: "3", Action.INT4: "4", Action.INT8: "8", Action.FULL: "F"}


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """A fixed plan and its divergence from full depth in nats per token, on the text of its search."""

    name: str
    actions: Actions
    """One per layer."""
    head: Action
    divergence: float

    def cost(self, costs: CostTable) -> float:
        """Returns its cost as a share of a full-depth token. More than full depth's counts as full depth's."""
        return min(1.0, costs.token_cost(self.actions, self.head))

    def runs_on(self, costs: CostTable) -> bool:
        """Returns True if the table has a cost for everything that it runs."""
        return set(self.actions) <= set(costs.layer) and self.head in costs.head

    @property
    def letters(self) -> str:
        """One character per layer: `.` for SKIP, `3`, `4`, `8`, `F`."""
        return "".join(_LETTERS[action] for action in self.actions)

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        actions = [action.name for action in self.actions]
        return {"name": self.name, "actions": actions, "head": self.head.name, "divergence": self.divergence}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "MeasuredPlan":
        """Returns the plan that `to_json` described.

        Raises:
            ConfigError: it has no name on one line, no actions, or a divergence that cannot be.
            AttributeError, KeyError, TypeError, ValueError: `facts` is no such description.
        """
        name, actions, head = facts["name"], tuple(Action[name] for name in facts["actions"]), Action[facts["head"]]
        divergence = float(facts["divergence"])
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ConfigError("plans", "one has a name that is no text on one line")
        if not actions or not 0 <= divergence < _MAX_DIVERGENCE:
            raise ConfigError("plans", "one has no layers, or a divergence that cannot be")
        return cls(name, actions, head, divergence)


def full_depth_plan(costs: CostTable) -> MeasuredPlan:
    """Returns full depth as one of the fixed plans."""
    return MeasuredPlan(FULL_DEPTH_NAME, (costs.highest,) * costs.num_layers, max(costs.head), 0.0)


def named(plans: Iterable[MeasuredPlan], costs: CostTable) -> tuple[MeasuredPlan, ...]:
    """Returns the plans with a name each, in their order: `fixed-int4` for one action in all layers, else by their cost
    on this table, `plan-0.48`."""
    taken: set[str] = set()
    result: list[MeasuredPlan] = []
    for plan in plans:
        name = next(name for name in _names(plan, costs) if name not in taken)
        taken.add(name)
        result.append(replace(plan, name=name))
    return tuple(result)


def _names(plan: MeasuredPlan, costs: CostTable) -> Iterable[str]:
    (action, *others) = set(plan.actions)
    if not others:
        is_usual = plan.head is fixed_head(action, tuple(costs.head))
        name = FULL_DEPTH_NAME if action is Action.FULL else f"fixed-{action.name.lower()}"
        yield name if is_usual else f"fixed-{action.name.lower()}-{plan.head.name.lower()}-head"
    for digits in range(2, 17):
        yield f"plan-{plan.cost(costs):.{digits}f}"
    yield from (f"plan-{plan.cost(costs):.2f}-{number}" for number in range(2, 1_000))


def usable(plans: Iterable[MeasuredPlan], costs: CostTable) -> tuple[MeasuredPlan, ...]:
    """Returns the plans that run on this table's device, and full depth, which always does."""
    own = tuple(plan for plan in plans if plan.runs_on(costs) and len(plan.actions) == costs.num_layers)
    full = full_depth_plan(costs)
    return own if any(_is_same(plan, full) for plan in own) else (*own, full)


def _is_same(plan: MeasuredPlan, other: MeasuredPlan) -> bool:
    return (plan.actions, plan.head) == (other.actions, other.head)


def not_dominated(plans: Iterable[MeasuredPlan], costs: CostTable) -> list[MeasuredPlan]:
    """Returns the plans that no other beats in cost and divergence, by ascending cost."""
    return undominated(plans, lambda plan: (plan.cost(costs), plan.divergence))
