"""The frontier of a device: the learned policy at its prices and the fixed plans, without what another of them beats.

Knows costs and divergences; knows no tensors and no requests.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dash_runtime.actions import CostTable
from dash_runtime.policy.budgets import HARMLESS, HARMLESS_UNTRIED, Budgets
from dash_runtime.policy.fixed_plans import MeasuredPlan, not_dominated, usable
from dash_runtime.policy.pareto import undominated


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs within a budget: a fixed plan, or the learned policy at a price if `plan` is None."""

    cost: float
    divergence: float
    plan: MeasuredPlan | None = None
    price: float = 1.0


class Frontier:
    """The best choice at each budget, at one cost table.

    Args:
        plans: those with an action that the table has no cost for are left out; full depth is always among them.
        budgets: the learned policy's; None if there is none.
    """

    def __init__(self, costs: CostTable, plans: Iterable[MeasuredPlan], budgets: Budgets | None = None) -> None:
        best = not_dominated(usable(plans, costs), costs)
        self._plans = [Choice(plan.cost(costs), plan.divergence, plan) for plan in best]
        self._budgets = budgets
        learned = [] if budgets is None else [self._learned(point.cost) for point in budgets.points if point.cost <= 1]
        # A plan comes before a policy that is as good: it is evaluated for nothing.
        points = undominated([*self._plans, *learned], lambda own: (own.cost, own.divergence, own.plan is None))
        self.points: tuple[Choice, ...] = tuple(points)
        """What no other point beats in cost and divergence, by ascending cost."""

    @property
    def lowest_budget(self) -> float:
        return self.points[0].cost

    @property
    def recommended_budget(self) -> float:
        """The lowest harmless budget, of a fixed plan or of the policy."""
        most = HARMLESS_UNTRIED if self._budgets is None else HARMLESS
        harmless = [plan.cost for plan in self._plans if plan.divergence <= most]
        if self._budgets is not None and self._budgets.divergence(self._budgets.recommended) <= HARMLESS:
            harmless.append(self._budgets.recommended)
        return min(harmless)

    def within(self, budget: float) -> Choice:
        """Returns the choice that diverges least within a budget; the cheapest if the budget is below the lowest."""
        choices = [choice for choice in self._plans if choice.cost <= budget]
        if self._budgets is not None and budget >= self._budgets.lowest:
            choices.append(self._learned(budget))
        return min(choices, key=lambda own: (own.divergence, own.cost), default=self.points[0])

    def is_beaten(self, cost: float, divergence: float) -> bool:
        """Returns True if a fixed plan costs no more and diverges no more."""
        return any(plan.cost <= cost and plan.divergence <= divergence for plan in self._plans)

    def _learned(self, budget: float) -> Choice:
        assert self._budgets is not None
        cost = min(budget, self._budgets.highest)
        return Choice(cost, self._budgets.divergence(cost), price=self._budgets.price(cost))
