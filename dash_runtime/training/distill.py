"""Distils low-rank compensation end to end: it minimises the divergence of the whole path, not each layer's own error.

Knows which layers are skipped and the divergence that results; knows no policy and no prices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import LowRank
from dash_runtime.training.dense_decoder import Compensate, DenseDecoder, Text, token_batch
from dash_runtime.training.loss import TrainingDiverged, row_divergences

ActionsFor = Callable[[Text, Compensate], Tensor]
"""Returns the actions of a path, as Action's numbers `[num_layers, batch, decided]`, with the present compensation."""

DistillProgress = Callable[[int, float], None]
"""Called with the step and the mean divergence of its tokens before it, in nats."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """`learning_rate` is relative: every parameter is scaled so that its usual input and output have power 1.

    It rises over the first `warmup_share` of the steps and then falls to `final_rate_share` of itself. The held-out
    sequences are evaluated every `evaluate_every` steps.
    """

    steps: int = 200
    sequences_per_step: int = 8
    learning_rate: float = 2e-4
    seed: int = 0
    num_prompt_tokens: int = 16
    warmup_share: float = 0.05
    final_rate_share: float = 0.1
    gradient_limit: float = 1.0
    evaluate_every: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "sequences_per_step", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, f"must be above 0 and finite, got {getattr(self, name)}")
        for name in ("warmup_share", "final_rate_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(name, f"must be between 0 and 1, got {getattr(self, name)}")
        if self.num_prompt_tokens < 0:
            raise ConfigError("num_prompt_tokens", f"must not be negative, got {self.num_prompt_tokens}")

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        warmth = min(1.0, (step + 1) / max(1.0, self.warmup_share * self.steps))
        return self.learning_rate * warmth * (1 - (1 - self.final_rate_share) * step / self.steps)


def distill_compensation(
    decoder: DenseDecoder,
    start: LowRank,
    sequences: Sequence[Sequence[int]],
    actions_for: ActionsFor,
    settings: DistillSettings,
    progress: DistillProgress,
    held_out: Sequence[Sequence[int]] = (),
    skip_kernel: Action = Action.FULL,
) -> LowRank:
    """Trains `start` on `sequences`, all of one length, to a lower divergence of the paths that `actions_for` takes.

    Returns the compensation with the best evaluation on `held_out`, which includes the start, or the last one if
    nothing is held out. `actions_for` is called in every step, but only once for the held-out sequences.

    Raises:
        ConfigError: the sequences are unusable, or `actions_for` answers in another shape.
        TrainingDiverged: the loss or its gradient is not a number.
    """
    token_ids = token_batch(sequences, settings.num_prompt_tokens)
    generator = torch.Generator().manual_seed(settings.seed)
    trained = _Trained(decoder, start, token_ids[: settings.sequences_per_step])
    optimizer = torch.optim.Adam(trained.parameters(), settings.learning_rate)
    judge = _Judge(decoder, start, held_out, actions_for, settings, skip_kernel) if held_out else None
    best = trained.copy()
    lowest = math.inf if judge is None else judge(best)
    for step in range(settings.steps):
        picked = torch.randperm(len(token_ids), generator=generator)[: settings.sequences_per_step]
        text = decoder.text(token_ids[picked], settings.num_prompt_tokens)
        actions = _actions(actions_for, text, trained.copy(), decoder.num_layers)
        loss = path_divergence(decoder, text, actions, trained.compensation(), skip_kernel).mean()
        if not loss.isfinite():
            raise TrainingDiverged(f"the divergence in step {step} of the distillation is not a number")
        if loss.requires_grad:  # False if the batch skips nothing
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), settings.gradient_limit)
            if not norm.isfinite():
                raise TrainingDiverged(f"the gradient in step {step} of the distillation is not a number")
            optimizer.step()
        progress(step, float(loss.detach()))
        is_last = step + 1 == settings.steps
        if judge is not None and ((step + 1) % settings.evaluate_every == 0 or is_last):
            latest = trained.copy()
            divergence = judge(latest)
            if divergence < lowest:
                best, lowest = latest, divergence
    return trained.copy() if judge is None else best


def path_divergence(
    decoder: DenseDecoder, text: Text, actions: Tensor, compensate: Compensate, skip_kernel: Action = Action.FULL
) -> Tensor:
    """Returns KL(full depth ‖ the path with these actions) in nats, float32 `[batch, decided]`.

    `actions` are Action's numbers, `[num_layers, batch, decided]`. Differentiable in the compensation.
    """
    hidden = decoder.embed(text.token_ids)
    for layer, own in enumerate(actions):
        hidden, _, _ = decoder.run_layer(layer, own, hidden, text, compensate, skip_kernel)
    divergences = row_divergences(decoder, text.full.flatten(0, 1), hidden.flatten(0, 1))
    return divergences.view(text.token_ids.shape)


class _Trained(nn.Module):
    """float32 parameters of a `LowRank`, scaled by the usual sizes of their inputs and outputs.

    A model's channels differ in size by factors of a thousand, and Adam moves every parameter by the same amount. With
    the sizes taken out, one learning rate suits all parameters.
    """

    def __init__(self, decoder: DenseDecoder, start: LowRank, token_ids: Tensor) -> None:
        super().__init__()
        inputs, deltas, codes = _usual_sizes(decoder, start, token_ids)
        self.down_scale = codes.unsqueeze(2) / inputs.unsqueeze(1)  # [num_layers, rank, hidden_size]
        self.up_scale = deltas.unsqueeze(2) / codes.unsqueeze(1)  # [num_layers, hidden_size, rank]
        self.offset_scale = deltas
        self.down = nn.Parameter(start.down.to(decoder.device).float() / self.down_scale)
        self.up = nn.Parameter(start.up.to(decoder.device).float() / self.up_scale)
        self.offsets = nn.Parameter(start.offsets.to(decoder.device).float() / self.offset_scale)

    def compensation(self) -> LowRank:
        """Returns the compensation with the present parameters; gradients flow through it."""
        return LowRank(self.down * self.down_scale, self.up * self.up_scale, self.offsets * self.offset_scale)

    @torch.no_grad()
    def copy(self) -> LowRank:
        return self.compensation()


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


class _Judge:
    """Computes the mean divergence on held-out sequences, whose actions stay the same."""

    def __init__(
        self,
        decoder: DenseDecoder,
        start: LowRank,
        held_out: Sequence[Sequence[int]],
        actions_for: ActionsFor,
        settings: DistillSettings,
        skip_kernel: Action,
    ) -> None:
        self._decoder = decoder
        self._skip_kernel = skip_kernel
        token_ids = token_batch(held_out, settings.num_prompt_tokens)
        texts = [
            decoder.text(part, settings.num_prompt_tokens) for part in token_ids.split(settings.sequences_per_step)
        ]
        self._parts = [(text, _actions(actions_for, text, start, decoder.num_layers)) for text in texts]

    @torch.no_grad()
    def __call__(self, compensation: LowRank) -> float:
        parts = [
            path_divergence(self._decoder, text, actions, compensation, self._skip_kernel).flatten()
            for text, actions in self._parts
        ]
        return float(torch.cat(parts).mean())


@torch.no_grad()
def _actions(actions_for: ActionsFor, text: Text, compensate: Compensate, num_layers: int) -> Tensor:
    actions = actions_for(text, compensate)
    expected = (num_layers, *text.token_ids.shape)
    if actions.dtype is not torch.int64 or tuple(actions.shape) != expected:
        raise ConfigError("actions_for", f"must answer int64 {expected}, got {actions.dtype} {tuple(actions.shape)}")
    return actions
