"""Calibrates a policy: what it does at each price, and what fixed plans do on the same text.

Knows policies and rollouts; knows no learning and no files.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from dash_runtime.actions import Action
from dash_runtime.decoder.full_path import full_outputs
from dash_runtime.policy.budgets import BudgetCalibration, PricePoint
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.frontier import Frontier
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.progress import Progress
from dash_runtime.rollout.choices import action_rates
from dash_runtime.rollout.task import Task, greedy_outcome
from dash_runtime.startup.plan_search import measure_plans, search_plans, search_text

CALIBRATION_PRICES = tuple(0.05 * 2 ** (step / 2) for step in range(17))
"""λ from 0.05 to 12.8, in steps of √2."""
_SEARCH_SEQUENCES = 4
"""A plan is searched on so many of the sequences at most, and measured on all of them."""


def calibrate(
    task: Task, network: PolicyNetwork, sequences: Sequence[Sequence[int]], progress: Progress
) -> BudgetCalibration:
    """Measures on `sequences` what the policy does at a ladder of prices."""
    full = full_outputs(task.decoder, sequences)
    points: list[PricePoint] = []
    for number, price in enumerate(CALIBRATION_PRICES, start=1):
        progress(f"calibrating: price {number} of {len(CALIBRATION_PRICES)}, {len(sequences)} sequences")
        outcome, actions = greedy_outcome(task, network, sequences, price, full)
        rates = action_rates(actions).sum(dim=0).tolist()  # layers of a token that run with each action
        counts = {action: count for action, count in zip(Action, rates, strict=True) if count}
        point = PricePoint(math.log(price), counts, max(0.0, outcome.divergence), outcome.agreement)
        # Prices at the ends of the ladder often decide alike; the cheapest says it all.
        if not points or points[-1].counts != counts:
            points.append(point)
    return BudgetCalibration(tuple(points))


def calibrate_plans(task: Task, sequences: Sequence[Sequence[int]]) -> tuple[MeasuredPlan, ...]:
    """Searches fixed plans with the task's compensation and costs, and measures them on `sequences`."""
    text = search_text(task.decoder.config, sequences[:_SEARCH_SEQUENCES])
    return measure_plans(task, sequences, search_plans(task, text))


def calibrated(
    policy: LearnedPolicy, task: Task, sequences: Sequence[Sequence[int]], rounding: str | None, progress: Progress
) -> LearnedPolicy:
    """Returns the policy with its calibration and plans made anew on `sequences`. The task is the policy's own, and
    `rounding` identifies its rounded weights."""
    calibration = calibrate(task, policy.network, sequences, progress)
    progress("searching fixed plans on the same text")
    return replace(policy, calibration=calibration, plans=calibrate_plans(task, sequences), rounding=rounding)


def describe_budgets(policy: LearnedPolicy) -> str:
    """Returns the budgets at the policy's own costs in words, and what is best to run."""
    budgets = policy.budgets(policy.costs)
    words = f"budgets {budgets.lowest:.3f} to {budgets.highest:.3f}"
    if policy.is_drafter:
        return f"{words}, recommended for drafting {budgets.best_for_drafting:.3f}"
    frontier = Frontier(policy.costs, policy.plans, budgets)
    best = frontier.within(frontier.recommended_budget)
    words += f", recommended {frontier.recommended_budget:.3f}"
    words += f" with the fixed plan {best.plan.name}" if best.plan is not None else f" with {policy.name}"
    if all(point.plan is not None for point in frontier.points):
        words += "; fixed plans beat the policy at every budget"
    return words
