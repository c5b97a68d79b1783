"""Climbs the compensation ladder on one model: each rung's cost, file size and divergence.

Every rung is fitted on the same text and judged on the same other text, under the same random skips. Knows rungs and
costs; knows no learned policy and no files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.full_path import full_path
from dash_runtime.layers.compensation import Compensation, Identity, packed
from dash_runtime.progress import Progress
from dash_runtime.rollout.choices import random_choice
from dash_runtime.rollout.task import Task, path_outcome
from dash_runtime.startup.fit_compensation import fit_compensation
from dash_runtime.startup.measure_costs import StepMeasurement, measure_costs
from dash_runtime.training.linear_compensation import LinearFit

SKIPS_PER_TOKEN = 3.5
_MOST_SKIPPED = 0.5
"""Of a small model's free layers this share is skipped at most."""
"""The skips of a budget of about 0.9 on the embedded model."""
_FIT_BATCH = 8


@dataclass(frozen=True, slots=True)
class Rung:
    """The figures of one rung: `cost` of one skip over a full layer, `divergence` under random skips."""

    name: str
    cost: float
    divergence: float
    kilobytes: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def fit_linear(task: Task, sequences: Sequence[Sequence[int]]) -> LinearFit:
    """Gathers the sums for the linear rungs along the full path, without each sequence's first token."""
    fit = LinearFit(task.decoder)
    for start in range(0, len(sequences), _FIT_BATCH):
        batch = sequences[start : start + _FIT_BATCH]
        path = full_path(task.decoder, batch)
        rows = torch.tensor([place > 0 for ids in batch for place in range(len(ids))])
        for layer in range(task.decoder.num_layers):
            fit.add(layer, path[layer][rows], path[layer + 1][rows])
    return fit


def climb(
    task: Task,
    fitting: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    ranks: Sequence[int],
    progress: Progress,
) -> Iterator[tuple[Rung, Compensation]]:
    """Yields each rung of the ladder."""
    closed_form = fit_compensation(task.decoder, fitting[:_FIT_BATCH])
    linear = fit_linear(task, fitting)
    low_rank = {rank: linear.low_rank(rank) for rank in ranks}
    rungs: dict[str, Compensation] = {"identity": Identity(), "scale": closed_form.scale, "affine": closed_form.affine}
    dtype = task.decoder.dtype
    rungs |= {f"low rank {rank}": packed(rung, dtype) for rank, rung in low_rank.items()}
    rungs["dense"] = linear.dense()
    for name, compensation in rungs.items():
        progress(f"judging {name}")
        yield _judge(name, task, compensation, held_out), compensation


def _rates(task: Task) -> Tensor:
    """Returns rates `[num_layers, 4]` that skip each free layer equally often, `SKIPS_PER_TOKEN` in all."""
    free = list(task.spec.free_layers)
    rates = torch.zeros(task.decoder.num_layers, len(Action))
    rates[:, Action.FULL - 1] = 1
    skipped = min(_MOST_SKIPPED, SKIPS_PER_TOKEN / len(free))
    rates[free, Action.SKIP - 1] = skipped
    rates[free, Action.FULL - 1] = 1 - skipped
    return rates


def _judge(name: str, task: Task, compensation: Compensation, held_out: Sequence[Sequence[int]]) -> Rung:
    own = replace(task, compensation=compensation)
    outcome, _ = path_outcome(own, held_out, random_choice(_rates(task)))
    layer = measure_costs(StepMeasurement(task.decoder, compensation)).table.layer
    size = sum(tensor.nbytes for tensor in compensation.tensors().values())
    return Rung(name, layer[Action.SKIP] / layer[Action.FULL], outcome.divergence, size / 1000)
