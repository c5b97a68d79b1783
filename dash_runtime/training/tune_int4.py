"""Tunes a layer's INT4 matrices together until the layer puts out nearly what it does at full depth (a block at a
time, as BRECQ, Li et al. 2021, with values and grids as in EfficientQAT, Chen et al. 2024).

The gradient passes rounding as if there were none. Knows one layer; knows no text and no files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.layers.layer_body import Linears
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.int4_matrix import (
    INT4_GROUP_SIZE,
    INT4_OFFSETS_IN_STEP,
    INT4_ZERO_POINT,
    MOST_INT4_OFFSET,
    MOST_INT4_SCALE,
    Int4Matrix,
)
from dash_runtime.linears.quantization import rounded_linear

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


def tune_int4(
    run: Callable[[Tensor, Linears[Linear]], Tensor],
    layer: Linears[FullLinear],
    rounded: Mapping[int, Int4Matrix],
    passes: Sequence[LayerPass],
    seed: int,
    most_weights: int = _MOST_WEIGHTS,
) -> Mapping[int, Int4Matrix]:
    """Returns the matrices, by place, with other values and grids; as they are if they have more weights than that.

    Args:
        run: runs the layer, differentiably, with these matrices.
        layer: its matrices as loaded.
        rounded: those to tune, by place.
        seed: of the order of the passes.
    """
    if sum(matrix.values.numel() for matrix in rounded.values()) > most_weights:
        return rounded
    tuned: dict[int, _Tuned] = {}

    def matrix_at(place: int, full: FullLinear) -> Linear:
        if place not in rounded or full.finer_from == 0:
            return rounded_linear(Action.INT4, full)
        tuned[place] = _Tuned(full, rounded[place])
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
    """A matrix whose values and grids are tuned, but not those of the outputs that INT8 computes."""

    def __init__(self, full: FullLinear, matrix: Int4Matrix) -> None:
        self._matrix, self._bias, first = matrix, full.bias, full.finer_from
        self._finer = None if first is None else rounded_linear(Action.INT8, full.outputs(first)).weight
        own = matrix.outputs(0, first)
        self._steps, self._offsets, self._units = own.scales.float(), own.offsets.float(), own.units
        self.stretch, self.shift = (torch.zeros_like(self._steps, requires_grad=True) for _ in range(2))
        scales, zeros = (grid.unsqueeze(-1) for grid in own.grids())
        exact = (_grouped(full.weight[:first].float()) - zeros).div_(scales).add_(INT4_ZERO_POINT).flatten(1)
        values = own.values.float()
        self.values = values.add_(exact.sub_(values).clamp_(-_NEAREST, _NEAREST)).requires_grad_()

    def __call__(self, inputs: Tensor) -> Tensor:
        now = self._now()
        weight: Tensor = _Rounded.apply(now.values, *now.grids(), inputs.dtype)
        return functional.linear(
            inputs, weight if self._finer is None else torch.cat((weight, self._finer)), self._bias
        )

    @torch.no_grad()
    def matrix(self) -> Int4Matrix:
        """Returns all outputs' matrix as it is now."""
        values, steps, offsets, units = self._now()
        own = _in_range(values).to(torch.uint8), steps.to(torch.int16), offsets.to(torch.int16), units
        rest = self._matrix.outputs(len(values), None)
        return Int4Matrix(*(torch.cat(both) for both in zip(own, rest, strict=True)))

    def _now(self) -> Int4Matrix:
        """Returns the tuned outputs' matrix in float32, with whole scales and offsets, its values not yet rounded."""
        steps = _rounded(self._steps * (1 + self.stretch)).clamp(1, MOST_INT4_SCALE)
        offsets = _rounded(self._offsets + INT4_OFFSETS_IN_STEP * self.shift)
        offsets = offsets.clamp(-MOST_INT4_OFFSET - 1, MOST_INT4_OFFSET)
        return Int4Matrix(self.values, steps, offsets, self._units)


class _Rounded(torch.autograd.Function):
    """A matrix from values that are rounded, and its grids."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(values)
        steps = _grouped(_in_range(values)) - INT4_ZERO_POINT
        return steps.mul_(scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (values,) = ctx.saved_tensors
        own = _grouped(gradients[0].float())
        by_scale = own.mul(_grouped(_in_range(values)) - INT4_ZERO_POINT).sum(dim=-1)
        # Without a value's scale, which the optimiser would divide out again.
        return own.flatten(1), by_scale, own.sum(dim=-1), None


def _rounded(numbers: Tensor) -> Tensor:
    """Rounds, with the gradient of no rounding."""
    return numbers + (numbers.round() - numbers).detach()


def _grouped(weight: Tensor) -> Tensor:
    return weight.unflatten(1, (-1, INT4_GROUP_SIZE))


def _in_range(values: Tensor) -> Tensor:
    return values.round().clamp_(0, 15)
