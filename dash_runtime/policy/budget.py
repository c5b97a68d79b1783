"""Random plans that keep a compute budget: ADAPTIVE runs one if no learned policy is loaded.

Among all mixtures of actions with a given mean cost, the one of maximum entropy has rates proportional to
exp(−μ · cost); μ is found by bisection. Knows costs and rates; knows no tensors.
"""

import math

from dash_runtime.actions import Action, CostTable
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.policy import RandomPlan, edges

BUDGET_MARGIN = 0.01
"""The expected cost stays this far below the budget, which is an upper bound. It is about twice the standard error of
the mean over 64 tokens on the embedded model."""
_MAX_STEEPNESS = 1e4
_BISECTIONS = 60


def lowest_random_budget(costs: CostTable, actions: tuple[Action, ...], head: Action) -> float:
    """Returns the budget at which every layer but the edges always takes the cheapest action."""
    free = costs.num_layers - len(edges(costs.num_layers))
    pinned_cost = (costs.num_layers - free) * costs.layer[Action.FULL]
    cheapest = min(costs.layer[action] for action in actions)
    return min(1.0, costs.fixed + costs.head[head] + pinned_cost + free * cheapest + BUDGET_MARGIN)


def random_plan_for_budget(
    budget: float,
    costs: CostTable,
    actions: tuple[Action, ...],
    head: Action,
    compensation: Compensation,
) -> RandomPlan:
    """Returns the random plan of maximum entropy whose expected cost is a margin below `budget`.

    A budget that cannot be kept gets the cheapest plan, a budget of 1 full depth.
    """
    pinned = edges(costs.num_layers)
    free = costs.num_layers - len(pinned)
    always_paid = costs.fixed + costs.head[head] + len(pinned) * costs.layer[Action.FULL]
    mean_cost = (budget - BUDGET_MARGIN - always_paid) / max(free, 1)
    rates = {Action.FULL: 1.0} if budget >= 1 else _max_entropy_rates(mean_cost, costs, actions)
    return RandomPlan(
        rates=[rates] * costs.num_layers, name="random", head=head, compensation=compensation, pinned=pinned
    )


def _max_entropy_rates(mean_cost: float, costs: CostTable, actions: tuple[Action, ...]) -> dict[Action, float]:
    relative = {action: costs.layer[action] / costs.layer[Action.FULL] for action in actions}
    target = mean_cost / costs.layer[Action.FULL]

    def rates(steepness: float) -> dict[Action, float]:
        exponents = {action: -steepness * cost for action, cost in relative.items()}
        largest = max(exponents.values())
        weights = {action: math.exp(exponent - largest) for action, exponent in exponents.items()}
        total = sum(weights.values())
        return {action: weight / total for action, weight in weights.items()}

    low, high = -_MAX_STEEPNESS, _MAX_STEEPNESS
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        mean = sum(rate * relative[action] for action, rate in rates(middle).items())
        low, high = (middle, high) if mean > target else (low, middle)
    return rates(high)
