"""What a learned policy does at each price of compute, and so which price keeps a budget on a device.

A calibration holds how many layers run with each action, not what they cost: with the cost table in force the mean cost
at a price is exact on every device. Knows counts and costs; knows no network and no files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from dash_runtime.actions import Action, CostTable
from dash_runtime.policy.draft_length import USUAL_LENGTHS, USUAL_VERIFICATION_COST, drafting_gain
from dash_runtime.policy.pareto import undominated
from dash_runtime.policy.plan_spec import PlanSpec

HARMLESS = 0.05
"""Divergence in nats per token; the lowest budget within it is recommended."""
HARMLESS_UNTRIED = 0.01
"""The same for a model without a policy: nobody has looked at what its plans do to its answers."""


@dataclass(frozen=True, slots=True)
class PricePoint:
    """What a policy does at one price λ: means over the tokens of the calibration's text."""

    log_price: float
    counts: Mapping[Action, float]
    """Layers of a token that run with each action, pinned ones included."""
    divergence: float
    """From full depth, in nats per token."""
    agreement: float
    """Share of tokens with full depth's most likely token."""


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """What a policy does at one price on one device."""

    cost: float
    log_price: float
    divergence: float
    agreement: float


@dataclass(frozen=True, slots=True)
class BudgetCalibration:
    """What a policy does over its range of prices."""

    points: tuple[PricePoint, ...]
    """Ascending in price."""

    def budgets(self, spec: PlanSpec, costs: CostTable) -> "Budgets":
        """Returns the budgets that can be kept at these costs."""

        def at(point: PricePoint) -> BudgetPoint:
            cost = costs.mean_cost(point.counts, spec.head, spec.num_evaluations)
            return BudgetPoint(cost, point.log_price, point.divergence, point.agreement)

        return Budgets.of([at(point) for point in self.points])

    def counts(self, price: float) -> Mapping[Action, float]:
        """Returns how many layers of a token run with each action at about this price."""
        return min(self.points, key=lambda point: abs(point.log_price - math.log(price))).counts

    def without(self, unsupported: set[Action]) -> "BudgetCalibration":
        """Returns it for a device without kernels for some actions: their layers count as the next dearer one's."""

        def moved(counts: Mapping[Action, float]) -> dict[Action, float]:
            supported = [action for action in Action if action not in unsupported]
            result = dict.fromkeys(supported, 0.0)
            for action, count in counts.items():
                result[next(other for other in supported if other >= action)] += count
            return result

        return BudgetCalibration(
            tuple(
                PricePoint(point.log_price, moved(point.counts), point.divergence, point.agreement)
                for point in self.points
            )
        )


@dataclass(frozen=True, slots=True)
class Budgets:
    """The budgets that a policy can keep on a device."""

    points: tuple[BudgetPoint, ...]
    """Ascending in cost, from the lowest budget to the highest; each diverges less than the one before."""

    @classmethod
    def of(cls, points: list[BudgetPoint]) -> "Budgets":
        """Leaves out points that another beats in cost and divergence, and those that cost more than full depth. If
        only such are harmless, the cheapest of them counts as full depth: by a table that is off, or on a device that
        the policy was not made for, a request must not lose more than anybody recommends."""
        affordable = [point for point in points if point.cost <= 1]
        if not any(point.divergence <= HARMLESS for point in affordable):
            harmless = sorted((point for point in points if point.divergence <= HARMLESS), key=_rank)
            affordable += [replace(point, cost=1.0) for point in harmless[:1]]
        return cls(tuple(undominated(affordable or sorted(points, key=_rank)[:1], _rank)))

    @property
    def lowest(self) -> float:
        return min(1.0, self.points[0].cost)

    @property
    def highest(self) -> float:
        return min(1.0, self.points[-1].cost)

    @property
    def recommended(self) -> float:
        """The lowest harmless budget, interpolated, or the highest if none is harmless."""
        place = next((place for place, point in enumerate(self.points) if point.divergence <= HARMLESS), None)
        if not place:
            return self.highest if place is None else self.lowest
        low, high = self.points[place - 1 : place + 1]
        # A hair below the limit, which rounding must not exceed.
        share = (low.divergence - HARMLESS * (1 - 1e-6)) / (low.divergence - high.divergence)
        return min(1.0, low.cost + min(1.0, share) * (high.cost - low.cost))

    @property
    def best_for_drafting(self) -> float:
        """The budget at which greedy drafts of a usual length gain most."""

        def gain(point: BudgetPoint) -> float:
            return max(
                drafting_gain(point.agreement, point.cost, length, USUAL_VERIFICATION_COST) for length in USUAL_LENGTHS
            )

        return min(1.0, max(self.points, key=gain).cost)

    def price(self, budget: float) -> float:
        """Returns λ for a budget. Between two points log λ is interpolated linearly."""
        return math.exp(self._interpolated(budget, lambda point: point.log_price))

    def divergence(self, budget: float) -> float:
        """Returns the expected divergence at a budget, interpolated likewise."""
        return self._interpolated(budget, lambda point: point.divergence)

    def _interpolated(self, budget: float, value: Callable[[BudgetPoint], float]) -> float:
        for low, high in pairwise(self.points):
            if low.cost <= budget < high.cost:
                return value(low) + (budget - low.cost) / (high.cost - low.cost) * (value(high) - value(low))
        return value(self.points[0] if budget < self.points[0].cost else self.points[-1])


def _rank(point: BudgetPoint) -> tuple[float, float]:
    return point.cost, point.divergence
