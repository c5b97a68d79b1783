"""Refits compensation on the states that a policy visits: distils it along the policy's own paths.

Knows a task and a policy's network; knows no files.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.compensation import LowRank
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.rollout.choices import greedy_choice
from dash_runtime.rollout.task import Task
from dash_runtime.training.differentiable_decoder import DifferentiableDecoder
from dash_runtime.training.distill import ActionsFor, DistillProgress, DistillSettings, distill_compensation

_DEAREST_SHARE = 0.5
"""Share of the prices, the dearest on a log scale, that is left out: there nearly everything is skipped."""


def refit_compensation(
    task: Task,
    start: LowRank,
    network: PolicyNetwork,
    decoder: DifferentiableDecoder,
    sequences: Sequence[Sequence[int]],
    price_range: tuple[float, float],
    settings: DistillSettings,
    progress: DistillProgress,
) -> LowRank:
    """Distils `start` under the greedy policy, at a price drawn for each sequence. The task is as in serving.

    Raises:
        TrainingDiverged: the divergence is not a number.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    actions_for = policy_skips(task, network, price_range, generator)
    return distill_compensation(decoder, start, sequences, actions_for, settings, progress)


def policy_skips(
    task: Task, network: PolicyNetwork, price_range: tuple[float, float], generator: torch.Generator
) -> ActionsFor:
    """Returns the skips of the greedy policy, at a price per sequence from the cheaper part of the range."""
    low, high = (math.log(price) for price in price_range)
    high = low + (1 - _DEAREST_SHARE) * (high - low)

    def skipped(batch: list[list[int]]) -> Tensor:
        per_sequence = torch.empty(len(batch)).uniform_(low, high, generator=generator)
        log_price = per_sequence.repeat_interleave(torch.tensor([len(ids) for ids in batch]))
        rollout = task.roll_out(batch, greedy_choice(task.spec, network, log_price))
        return rollout.actions == int(Action.SKIP)

    return skipped
