"""Tunes a layer's rounded matrices together until the layer puts out nearly what it does at full depth (a block at a
time, as BRECQ, Li et al. 2021, with values and grids as in EfficientQAT, Chen et al. 2024).

The gradient passes rounding as if there were none. Knows one layer; knows no text and no files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.layers.layer_body import Linears
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.grouped_matrix import (
    GROUP_SIZE,
    MOST_OFFSET,
    MOST_SCALE,
    OFFSETS_IN_STEP,
    GroupedMatrix,
    joined_outputs,
    zero_point,
)
from dash_runtime.linears.quantization import quantized_parts, rounded_linear

_MOST_WEIGHTS = 1 << 29
"""Each weight takes 16 bytes while it is tuned."""
_EPOCHS = 2
_VALUE_RATE = 0.02
"""The distance by which a step moves a value, in steps of its grid, at first."""
_GRID_RATE = 1e-3
"""The distance by which a step moves a grid, as a share of its scale, at first."""
_WARM_UP = 10
"""Steps until the rates are reached."""
_NEAREST = 0.45
"""The distance from its rounded value at which a value begins at most, on the side of what was rounded."""


class LayerPass(NamedTuple):
    """Some sequences' way through a layer, `[batch, length, hidden_size]` each."""

    inputs: Tensor
    """The states that the layer before left, with its tuned matrices."""
    full_inputs: Tensor
    """Full depth's states there."""
    goal: Tensor
    """Full depth's states behind the layer."""


def tune_rounding(
    run: Callable[[Tensor, Linears[Linear]], Tensor],
    action: Action,
    layer: Linears[FullLinear],
    rounded: Mapping[int, GroupedMatrix],
    passes: Sequence[LayerPass],
    seed: int,
    most_weights: int = _MOST_WEIGHTS,
) -> Mapping[int, GroupedMatrix]:
    """Returns the matrices, by place, with other values and grids; as they are if they have more weights than that.

    Args:
        run: runs the layer, differentiably, with these matrices.
        action: whose matrices they are, INT4 or INT3.
        layer: its matrices as loaded.
        rounded: those to tune, by place.
        seed: of the order of the passes.
    """
    if sum(matrix.values.numel() for matrix in rounded.values()) > most_weights:
        return rounded
    tuned: dict[int, _Tuned] = {}

    def matrix_at(place: int, full: FullLinear) -> Linear:
        (precision, _), *finer = quantized_parts(action, full)
        if place not in rounded or precision is not action:
            return rounded_linear(action, full)
        rest = [rounded_linear(*part).weight for part in finer]
        tuned[place] = _Tuned(full, rounded[place], torch.cat(rest) if rest else None)
        return tuned[place]

    linears = layer.mapped_by_place(matrix_at, lambda router: router)
    if tuned:
        with torch.enable_grad():
            _descend(lambda inputs: run(inputs, linears), list(tuned.values()), passes, seed)
    return {**rounded, **{place: own.matrix() for place, own in tuned.items()}}


def _descend(
    run: Callable[[Tensor], Tensor], tuned: Sequence["_Tuned"], passes: Sequence[LayerPass], seed: int
) -> None:
    groups = [
        {"params": [own.values for own in tuned], "lr": _VALUE_RATE},
        {"params": [grid for own in tuned for grid in (own.stretch, own.shift)], "lr": _GRID_RATE},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    num_steps = _EPOCHS * len(passes)

    def rate(step: int) -> float:
        return min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / num_steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_EPOCHS):
        for place in torch.randperm(len(passes), generator=generator).tolist():
            inputs, full_inputs, goal = passes[place]
            errors = _squared(run(inputs) - goal)
            # Each token's as a share of what the layer adds: a few tokens have states a hundred times as large.
            added = _squared(goal - full_inputs).clamp_min(torch.finfo().tiny)
            optimiser.zero_grad()
            (errors / added).mean().backward()
            optimiser.step()
            schedule.step()


def _squared(states: Tensor) -> Tensor:
    """Returns the squares of the states' lengths, float32 `[batch, length]`."""
    return states.float().square().sum(dim=-1)


class _Tuned:
    """A matrix whose values and grids are tuned, but not those of its last outputs if a finer action computes them,
    with the weights `finer`."""

    def __init__(self, full: FullLinear, matrix: GroupedMatrix, finer: Tensor | None) -> None:
        self._matrix, self._bias, self._finer = matrix, full.bias, finer
        first = None if finer is None else -len(finer)
        own = matrix.outputs(0, first)
        self._steps, self._offsets, self._units = own.scales.float(), own.offsets.float(), own.units
        self.stretch, self.shift = (torch.zeros_like(self._steps, requires_grad=True) for _ in range(2))
        scales, zeros = (grid.unsqueeze(-1) for grid in own.grids())
        exact = (_grouped(full.weight[:first].float()) - zeros).div_(scales).add_(matrix.zero_point).flatten(1)
        values = own.values.float()
        self.values = values.add_(exact.sub_(values).clamp_(-_NEAREST, _NEAREST)).requires_grad_()

    def __call__(self, inputs: Tensor) -> Tensor:
        now = self._now()
        weight: Tensor = _Rounded.apply(now.values, *now.grids(), now.bits, inputs.dtype)
        return functional.linear(
            inputs, weight if self._finer is None else torch.cat((weight, self._finer)), self._bias
        )

    @torch.no_grad()
    def matrix(self) -> GroupedMatrix:
        """Returns all outputs' matrix as it is now."""
        now = self._now()
        values = _in_range(now.values, now.bits).to(torch.uint8)
        own = replace(now, values=values, scales=now.scales.to(torch.int16), offsets=now.offsets.to(torch.int16))
        return joined_outputs((own, self._matrix.outputs(len(values), None)))

    def _now(self) -> GroupedMatrix:
        """Returns the tuned outputs' matrix in float32, with whole scales and offsets, its values not yet rounded."""
        steps = _rounded(self._steps * (1 + self.stretch)).clamp(1, MOST_SCALE)
        offsets = _rounded(self._offsets + OFFSETS_IN_STEP * self.shift)
        offsets = offsets.clamp(-MOST_OFFSET - 1, MOST_OFFSET)
        return GroupedMatrix(self.values, steps, offsets, self._units, self._matrix.bits)


class _Rounded(torch.autograd.Function):
    """A matrix from values that are rounded, and its grids."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scales: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(values)
        ctx.bits = bits
        steps = _grouped(_in_range(values, bits)) - zero_point(bits)
        return steps.mul_(scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (values,) = ctx.saved_tensors
        own = _grouped(gradients[0].float())
        by_scale = own.mul(_grouped(_in_range(values, ctx.bits)) - zero_point(ctx.bits)).sum(dim=-1)
        # Without a value's scale, which the optimiser would divide out again.
        return own.flatten(1), by_scale, own.sum(dim=-1), None, None


def _rounded(numbers: Tensor) -> Tensor:
    """Rounds, with the gradient of no rounding."""
    return numbers + (numbers.round() - numbers).detach()


def _grouped(weight: Tensor) -> Tensor:
    return weight.unflatten(1, (-1, GROUP_SIZE))


def _in_range(values: Tensor, bits: int) -> Tensor:
    return values.round().clamp_(0, 2**bits - 1)
