"""Trains low-rank compensation end to end: by the divergence of whole paths, not by each layer's own error.

Knows compensation, gradients and the dense model; knows no policy and no prices.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dash_runtime.layers.compensation import LowRank
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.choices import no_choice
from dash_runtime.training.dense_decoder import DenseDecoder, token_batch
from dash_runtime.training.loss import TrainingDiverged, judge
from dash_runtime.training.paths import decided_rows, run_path

_RATE = 6e-4
"""Relative: every parameter is scaled so that its usual input and output have power 1."""
_GRADIENT_LIMIT = 1.0


class TrainedLowRank(nn.Module):
    """The float32 parameters of a `LowRank`, scaled by the usual sizes of their inputs and outputs.

    A model's channels differ in size by factors of a thousand, and Adam moves every parameter by the same amount. With
    the sizes taken out, one learning rate suits all parameters.
    """

    down_scale: Tensor
    up_scale: Tensor
    offset_scale: Tensor

    def __init__(self, decoder: DenseDecoder, start: LowRank, token_ids: Tensor) -> None:
        super().__init__()
        inputs, deltas, codes = _usual_sizes(decoder, start, token_ids)
        self.register_buffer("down_scale", codes.unsqueeze(2) / inputs.unsqueeze(1))
        self.register_buffer("up_scale", deltas.unsqueeze(2) / codes.unsqueeze(1))
        self.register_buffer("offset_scale", deltas)
        self.down = nn.Parameter(start.down.to(decoder.device).float() / self.down_scale)
        self.up = nn.Parameter(start.up.to(decoder.device).float() / self.up_scale)
        self.offsets = nn.Parameter(start.offsets.to(decoder.device).float() / self.offset_scale)

    def compensation(self) -> LowRank:
        """Returns the compensation with the present parameters; gradients flow through it."""
        return LowRank(self.down * self.down_scale, self.up * self.up_scale, self.offsets * self.offset_scale)

    @torch.no_grad()
    def copy(self) -> LowRank:
        """Returns a copy of the compensation."""
        return self.compensation()


class CompensationTraining:
    """A compensation in training, with its optimiser."""

    def __init__(self, decoder: DenseDecoder, start: LowRank, token_ids: Tensor) -> None:
        self.trained = TrainedLowRank(decoder, start, token_ids)
        self.parameters = list(self.trained.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, betas=(0.9, 0.98))

    def step(self, outputs: Tensor, slope: Tensor, rate: float) -> None:
        """Takes a step against the slope of the divergence by the path's outputs, both `[rows, hidden_size]`.

        Raises:
            TrainingDiverged: a gradient is not a number.
        """
        # Where nothing was skipped there is no gradient.
        gradients = torch.autograd.grad(outputs, self.parameters, slope / len(outputs), allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if not nn.utils.clip_grad_norm_(self.parameters, _GRADIENT_LIMIT).isfinite():
            raise TrainingDiverged("the gradient of the compensation is not a number")
        for group in self.optimizer.param_groups:
            group["lr"] = _RATE * rate
        self.optimizer.step()


def refit_plan(
    decoder: DenseDecoder,
    spec: PlanSpec,
    start: LowRank,
    sequences: Sequence[Sequence[int]],
    steps: int,
    num_prompt_tokens: int,
    sequences_per_step: int = 8,
    rate: float = 1.0,
) -> LowRank:
    """Returns the compensation, trained for a fixed plan (`PlanSpec.fixed`): what a policy's control deserves.

    `rate` is the first step's share of the learning rate of policies.

    Raises:
        TrainingDiverged: a divergence is not a number.
    """
    token_ids, generator = token_batch(sequences, num_prompt_tokens), torch.Generator().manual_seed(0)
    training = CompensationTraining(decoder, start, token_ids[:sequences_per_step])
    for step in range(steps):
        own = token_ids[torch.randint(len(token_ids), (sequences_per_step,), generator=generator)]
        full = decided_rows(decoder.full_states(own)[-1], num_prompt_tokens)
        path = run_path(decoder, own, num_prompt_tokens, spec, training.trained.compensation(), no_choice)
        last = path.decided(path.states[-1])
        judged = judge(decoder, full, last, generator)
        training.step(last, judged.slope, rate * (1 - step / steps))
    return training.trained.copy()


@torch.no_grad()
def _usual_sizes(decoder: DenseDecoder, start: LowRank, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns root mean squares along the full path: of each layer's input channels and delta channels, `[num_layers,
    hidden_size]` each, and of the outputs of `start.down`, `[num_layers, rank]`."""
    states = [state.flatten(0, 1).float() for state in decoder.full_states(token_ids)]
    inputs = torch.stack([_size(state) for state in states[:-1]])
    deltas = torch.stack([_size(after - before) for before, after in pairwise(states)])
    down = start.down.to(decoder.device).float()
    codes = torch.stack([_size(state @ rows.T) for state, rows in zip(states[:-1], down, strict=True)])
    return inputs, deltas, codes


def _size(rows: Tensor) -> Tensor:
    """Returns the root mean square of each column, with a floor above zero."""
    size = rows.square().mean(dim=0).sqrt()
    floor = 1e-3 * size.mean()
    return size.clamp_min(float(floor)) if floor > 0 else torch.ones_like(size)
