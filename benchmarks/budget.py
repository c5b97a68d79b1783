"""Finds the compute budget of the adaptive figures in the shipped policy's calibration, at this device's costs.

Knows policy files; measures nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from dash_runtime.actions import CostTable
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.engine.engine import Engine
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import find_policies, load_policy
from dash_runtime.startup.build import SHIPPED_POLICIES
from dash_runtime.startup.cost_keeper import CostKeeper

DIVERGENCE_LIMIT = 0.10
"""Nats per token."""
_DIGITS = 10_000


@dataclass(frozen=True, slots=True)
class Budgets:
    """The default policy's lowest budget within the limit, the divergence there, and its recommended budget."""

    policy: str
    lowest: float
    divergence: float
    recommended: float


def costs_of(engine: Engine) -> CostTable:
    """Returns the cost table by which an engine counts budgets."""
    assert isinstance(engine.cost_watch, CostKeeper)
    return engine.cost_watch.costs.table


def shipped_policy(folder: Path) -> LearnedPolicy:
    """Returns the policy that serves the checkpoint in `folder` by default.

    Raises:
        RuntimeError: no policy is shipped for it.
    """
    model, weights = load_model_config(folder), open_weights(folder)
    fingerprint = model_fingerprint(model, weights)
    files = find_policies(SHIPPED_POLICIES, fingerprint)
    if not files:
        raise RuntimeError("no policy is shipped for this model")
    return load_policy(files[0], model, fingerprint, dtype=torch.bfloat16, device=torch.device("cpu"))


def shipped_budgets(folder: Path, costs: CostTable) -> Budgets:
    """Returns the budgets, at these costs, of the policy that serves the checkpoint in `folder` by default.

    Raises:
        RuntimeError: no policy is shipped for it, or none of its budgets is within the limit.
    """
    policy = shipped_policy(folder)
    points = policy.budgets(costs).points
    found = lowest_budget([point.cost for point in points], [point.divergence for point in points], DIVERGENCE_LIMIT)
    if found is None:
        raise RuntimeError(f"{policy.name} keeps {DIVERGENCE_LIMIT:g} nats per token at no budget")
    return Budgets(policy.name, *found, policy.recommended_budget(costs))


def lowest_budget(budgets: Sequence[float], divergences: Sequence[float], limit: float) -> tuple[float, float] | None:
    """Returns the lowest budget whose divergence is within the limit, and that divergence, linear between the points.

    `budgets` ascend. The result is rounded up to four digits, which a caller can type and a policy can keep.
    """
    if divergences[0] <= limit:
        return _rounded_up(budgets[0]), divergences[0]
    points = list(zip(budgets, divergences, strict=True))
    for (low, worse), (high, better) in pairwise(points):
        if better <= limit:
            budget = _rounded_up(low + (worse - limit) / (worse - better) * (high - low))
            share = min(1.0, (budget - low) / (high - low))
            return budget, worse + share * (better - worse)
    return None


def _rounded_up(budget: float) -> float:
    return min(1.0, math.ceil(budget * _DIGITS) / _DIGITS)
