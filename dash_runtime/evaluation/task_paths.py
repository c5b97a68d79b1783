"""The paths that answer a task's questions: full depth, fixed plans, and policies at their budgets.

Knows decoders, plans and policies; knows no questions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import Mode, SkipOptions
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.evaluation.likelihood import Run, plan_runner, rollout_runner
from dash_runtime.evaluation.open_answers import skip_options
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import FixedPlan, fixed_action_plan, full_depth
from dash_runtime.rollout.choices import greedy_choice


@dataclass(frozen=True, slots=True)
class TaskPath:
    """One path, and how questions reach it. Only that of a policy has a policy and a budget."""

    name: str
    kind: str
    budget: float | None
    policy: LearnedPolicy | None
    run: Run
    """Scores passages; it also decides the token that predicts the first scored one."""
    skip: SkipOptions | None
    """For an engine with the policy; None if an engine cannot run the path."""


def task_paths(
    decoder: Decoder,
    costs: CostTable,
    policies: Sequence[LearnedPolicy],
    budgets: Sequence[float],
    plans: Sequence[FixedPlan],
    context_length: int,
) -> Iterator[TaskPath]:
    """Returns full depth first, then the plans, then each policy at each budget.

    `costs` are those of full depth and of the plans; a policy has its own.
    """
    full = full_depth(decoder.num_layers)
    for plan in (full, *plans):
        run = plan_runner(decoder, plan, costs, context_length=context_length, decides_first=True)
        is_full = plan is full
        name, kind = ("full depth", "full_depth") if is_full else (plan.name, "fixed")
        yield TaskPath(name, kind, None, None, run, SkipOptions(Mode.FULL_DEPTH) if is_full else _fixed_mode(plan))
    for policy in policies:
        for budget in budgets:
            log_price = torch.tensor(math.log(policy.budgets(policy.costs).price(budget)))
            choose = greedy_choice(policy.spec, policy.network, log_price)
            run = rollout_runner(
                decoder,
                policy.spec,
                policy.compensation,
                choose,
                context_length=context_length,
                decides_first=True,
                num_evaluations=policy.num_evaluations,
            )
            yield TaskPath(policy.name, "policy", budget, policy, run, skip_options(budget, policy.name))


def plans_everywhere(decoder: Decoder) -> list[FixedPlan]:
    """Returns the plans that run every layer in INT4, and in INT8, as far as the device has them."""
    quantized = [action for action in (Action.INT3, Action.INT4, Action.INT8) if action in decoder.actions]
    return [fixed_action_plan(action, decoder.num_layers, Identity(), tuple(decoder.heads)) for action in quantized]


def _fixed_mode(plan: FixedPlan) -> SkipOptions | None:
    """Returns the engine's mode for a plan of one action."""
    (action, *others) = set(plan.plan)
    return None if others else SkipOptions(Mode.FIXED, fixed_action=action)
