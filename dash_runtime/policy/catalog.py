"""Which policy serves a request: from its skip options to a policy, a price and a cost table.

Knows policies and budgets; knows no sequences and no device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import Mode, PolicyFacts, SkipOptions
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.policy.budget import lowest_random_budget, random_plan_for_budget
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import FixedPlan, FullDepth, Policy, edges, fixed_action_plan

RANDOM_NOTE = (
    "not a learned policy: actions are drawn at random, at rates that keep the compute budget; "
    "expect worse text than from a learned policy at the same budget"
)


RANDOM_BUDGET = 0.8
"""Low enough to show what a policy saves; there is no budget at which random actions are good."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who decides for one sequence, at which price, and by which cost table it is accounted."""

    policy: Policy
    costs: CostTable
    price: float = 1.0
    compute_budget: float | None = None


class PolicyCatalog:
    """The policies of one model on one device.

    Args:
        costs: the device's own table, for the policies that have none in a file.
        actions: those with a kernel here.
        compensation: for the policies that have none in a file.
        learned: the trained ones; the first is the default policy.
        default_compute_budget: where a request sets none; None: what its policy recommends.
    """

    def __init__(
        self,
        costs: CostTable,
        actions: tuple[Action, ...],
        compensation: Compensation,
        learned: Sequence[LearnedPolicy],
        default_compute_budget: float | None = None,
    ) -> None:
        self._costs = costs
        self._actions = actions
        self._compensation = compensation
        self._learned = {policy.name: policy for policy in learned}
        self._default_compute_budget = default_compute_budget
        self._full_depth = Assignment(FullDepth(costs.num_layers), costs)
        self._fixed: dict[Action, FixedPlan] = {
            action: fixed_action_plan(action, costs, compensation, tuple(costs.head)) for action in actions
        }
        self._head = min(costs.head, key=lambda precision: costs.head[precision])
        self._random = lru_cache(maxsize=256)(self._make_random)
        self._facts = self._describe()

    def assign(self, skip: SkipOptions) -> Assignment:
        """The assignment for validated options; an unset budget is the default one, raised to what the
        policy can keep."""
        if skip.mode is Mode.FULL_DEPTH:
            return self._full_depth
        if skip.mode is Mode.FIXED:
            assert skip.fixed_action is not None
            return Assignment(self._fixed[skip.fixed_action], self._costs)
        name = skip.policy_name or self._facts[0].name
        chosen = next(facts for facts in self._facts if facts.name == name)
        default = self._default_compute_budget or chosen.recommended_budget
        budget = skip.compute_budget or max(default, chosen.lowest_budget)
        if learned := self._learned.get(chosen.name):
            return Assignment(learned, learned.costs, learned.calibration.price(budget), budget)
        return self._random(budget)

    def facts(self) -> tuple[PolicyFacts, ...]:
        """What callers may ask for, the default first."""
        return self._facts

    def _describe(self) -> tuple[PolicyFacts, ...]:
        costs = self._costs
        random = PolicyFacts(
            name="random",
            note=RANDOM_NOTE,
            learned=False,
            lookahead=1,
            pinned_layers=tuple(sorted(edges(costs.num_layers))),
            action_costs=_relative_costs(costs, self._actions),
            lowest_budget=lowest_random_budget(costs, self._actions, self._head),
            recommended_budget=RANDOM_BUDGET,
            compensation=self._compensation.kind.value,
        )
        learned = (
            PolicyFacts(
                name=policy.name,
                note="",
                learned=True,
                lookahead=policy.lookahead,
                pinned_layers=tuple(sorted(policy.pinned)),
                action_costs=_relative_costs(policy.costs, policy.actions),
                lowest_budget=policy.calibration.lowest_budget,
                recommended_budget=policy.calibration.recommended_budget,
                compensation=policy.compensation.kind.value,
            )
            for policy in self._learned.values()
        )
        return (*learned, random)

    def _make_random(self, budget: float) -> Assignment:
        plan = random_plan_for_budget(budget, self._costs, self._actions, self._head, self._compensation)
        return Assignment(plan, self._costs, compute_budget=budget)


def _relative_costs(costs: CostTable, actions: tuple[Action, ...]) -> dict[Action, float]:
    return {action: costs.layer[action] / costs.layer[Action.FULL] for action in actions}
