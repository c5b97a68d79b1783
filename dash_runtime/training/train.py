"""Trains a budget-conditioned policy with its compensation.

A stopped run resumes to the same result. Knows the task and the loop; knows no command line.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import LowRank, packed
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.rollout.task import Outcome, Task
from dash_runtime.training.actor_critic import ActorCritic
from dash_runtime.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dash_runtime.training.ppo import PpoSettings, UpdateLosses, collect, scheduled, update


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """An iteration learns from `sequences_per_iteration` sequences along `paths_per_sequence` paths each.

    Before the iterations in `refits` the compensation is refitted on the states that the policy then visits.
    """

    iterations: int = 240
    sequences_per_iteration: int = 4
    paths_per_sequence: int = 4
    refits: tuple[int, ...] = ()
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    seed: int = 0
    checkpoint_every: int = 10
    ppo: PpoSettings = field(default_factory=PpoSettings)

    def __post_init__(self) -> None:
        for name in ("iterations", "sequences_per_iteration", "paths_per_sequence", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")


TrainProgress = Callable[[int, float, Outcome, UpdateLosses], None]
"""Called with the iteration, mean λ, outcome of the sampled paths and losses."""

Refit = Callable[[Task, LowRank, PolicyNetwork, int], LowRank]
"""Refits compensation along the paths of a policy on a task; the number is a seed."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of training: a network, and the compensation that it was last trained with."""

    network: PolicyNetwork
    compensation: LowRank


def train(
    task: Task,
    compensation: LowRank,
    sequences: Sequence[Sequence[int]],
    settings: TrainSettings,
    checkpoint: Path,
    progress: TrainProgress,
    refit: Refit | None = None,
) -> Trained:
    """Trains on `sequences`, all of one length, starting with `compensation` instead of the task's.

    Every `checkpoint_every` iterations the state is written to `checkpoint`, in one rename. A run that finds it resumes
    there and ends as without the stop, since each iteration draws from its own seed.

    Raises:
        TrainingDiverged: the loss is not a number; the last checkpoint is intact.
        PolicyFileError: the checkpoint is damaged or of another run, or cannot be written.
    """
    hidden_size = task.decoder.config.hidden_size
    model = ActorCritic(task.spec, hidden_size, settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    signature = _signature(task, sequences, settings)
    start = 0
    if checkpoint.exists():
        kept = load_checkpoint(checkpoint, signature, model, optimizer)
        start, compensation = kept.iteration, kept.compensation.to(task.decoder.device)
    for iteration in range(start, settings.iterations):
        seed = settings.seed * 1_000_003 + iteration
        if iteration in settings.refits and refit is not None:
            served = replace(task, compensation=packed(compensation, task.decoder.dtype))
            compensation = refit(served, compensation, model.network(), seed)
        torch.manual_seed(seed)
        share = iteration / settings.iterations
        for group in optimizer.param_groups:
            group["lr"] = scheduled(settings.learning_rate, settings.final_learning_rate, share)
        picked = torch.randperm(len(sequences))[: settings.sequences_per_iteration].tolist()
        batch = [sequences[index] for index in picked]
        low, high = (math.log(price) for price in settings.ppo.price_range)
        per_sequence = torch.empty(len(batch)).uniform_(low, high)
        log_price = per_sequence.repeat_interleave(torch.tensor([len(ids) for ids in batch]))
        current = replace(task, compensation=packed(compensation, task.decoder.dtype))
        experience, outcome = collect(current, model, batch, settings.paths_per_sequence, log_price, settings.ppo)
        entropy_weight = scheduled(settings.ppo.entropy_start, settings.ppo.entropy_floor, share)
        generator = torch.Generator().manual_seed(seed)
        losses = update(task, model, optimizer, experience, entropy_weight, settings.ppo, generator)
        progress(iteration, float(per_sequence.exp().mean()), outcome, losses)
        if (iteration + 1) % settings.checkpoint_every == 0 or iteration + 1 == settings.iterations:
            save_checkpoint(checkpoint, signature, model, optimizer, Checkpoint(iteration + 1, compensation))
    return Trained(model.network(), compensation)


def _signature(task: Task, sequences: Sequence[Sequence[int]], settings: TrainSettings) -> str:
    """Returns a text that differs between runs that must not resume from each other's checkpoints."""
    spec = task.spec
    names = [action.name for action in spec.actions]
    text = [len(sequences), sum(map(sum, sequences))]
    layers = [sorted(spec.pinned.items()), spec.head.name, spec.lookahead, spec.block_size]
    return json.dumps([asdict(settings), names, *layers, text])
