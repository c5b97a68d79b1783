"""Rounds a matrix to four bits a weight or three, and 16 more for each group of 32 inputs.

Knows matrices; knows no layers and no kernels.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dash_runtime.actions import Action

GROUP_SIZE = 32
LANES = 16
"""Outputs that native code computes together, and the tokens of a head's tile."""
_GRID_FITS = 3
_SETTLED = 1e-3
"""A scale that a second fit would move by less than this share of itself stays."""
_KEEPS_VALUES = 0.1
"""A scale that moves by less than this share of itself leaves nearly all values."""
SCALE_BITS, OFFSET_BITS = 7, 9
"""Bits of a group's grid. What a wrong offset does adds up over a group."""
MOST_SCALE, MOST_OFFSET = 2**SCALE_BITS - 1, 2 ** (OFFSET_BITS - 1) - 1
OFFSETS_IN_STEP = 32
FINER_STEPS, FURTHER_MIDDLE = 8, 8
_ROWS_TOGETHER = 512
_NUM_CHECKED = 64
_NEARLY_EXACT = 0.02
"""An error of INT4, as a share of the weights: 0.004 of Q4_0's, and 0.07 to 0.1 of those of other files."""

Place = tuple[int, int]
"""A layer, and the number of a matrix in it (`Linears.mapped_by_place`)."""


def is_packable(out_features: int, in_features: int) -> bool:
    """Returns True if native code can take a matrix of this shape."""
    return out_features % LANES == 0 and in_features % GROUP_SIZE == 0


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """A matrix `[out, in]` in groups of 32 inputs: `weight ≈ (value − zero_point + offset / 32) · scale · unit`.

    A group has its grid in 16 bits, half a bit for each weight.
    """

    values: Tensor
    """uint8 `[out, in]`, below `2 ** bits`."""
    scales: Tensor
    """int16 `[out, in / 32]`, 1…127."""
    offsets: Tensor
    """int16 `[out, in / 32]`, −256…255."""
    units: Tensor
    """float32 `[out]`."""
    bits: int = 4

    @property
    def zero_point(self) -> int:
        """The value in the middle of the range."""
        return zero_point(self.bits)

    def grids(self) -> tuple[Tensor, Tensor]:
        """Returns float32 scales and zeros `[out, in / 32]`: `weight ≈ (value − zero_point) · scale + zero`."""
        scales = self.scales * self.units.unsqueeze(1)
        return scales, scales * self.offsets / OFFSETS_IN_STEP

    def tensors(self) -> dict[str, Tensor]:
        """Returns its tensors by name."""
        return {own.name: getattr(self, own.name) for own in fields(self) if own.name != "bits"}

    def mapped(self, convert: Callable[[Tensor], Tensor]) -> "GroupedMatrix":
        """Returns it with other tensors."""
        return _grouped(map(convert, self.tensors().values()), self.bits)

    def outputs(self, first: int, last: int | None) -> "GroupedMatrix":
        """Returns some of its rows."""
        return self.mapped(lambda own: own[first:last])

    def to(self, device: torch.device) -> "GroupedMatrix":
        """Returns it on a device."""
        return self.mapped(lambda own: own.to(device))

    def dequantized(self, inputs: Tensor | None = None) -> Tensor:
        """Returns the float32 matrix `[out, in]`, or only its columns of some inputs, int64 `[n]`."""
        columns = torch.arange(self.values.shape[1], device=self.values.device) if inputs is None else inputs
        scales, zeros = (own[:, columns // GROUP_SIZE] for own in self.grids())
        return (self.values[:, columns].float() - self.zero_point).mul_(scales).add_(zeros)


@dataclass(frozen=True, slots=True)
class RefinedMatrix:
    """An INT8 matrix whose upper bits are those of one in INT4: each step of that in eight, seven bits a weight."""

    coarse: GroupedMatrix
    further: Tensor
    """uint8 `[out, in]`, below 16: eighths of a step, from 8 less than the value in INT4 on."""

    def dequantized(self) -> Tensor:
        """Returns the float32 matrix `[out, in]`."""
        steps = (self.further.float() - FURTHER_MIDDLE).div_(FINER_STEPS).unflatten(1, (-1, GROUP_SIZE))
        return steps.mul_(self.coarse.grids()[0].unsqueeze(-1)).flatten(1).add_(self.coarse.dequantized())


def refine(weight: Tensor, coarse: GroupedMatrix) -> RefinedMatrix:
    """Rounds what an INT4 matrix has left of `[out, in]`. That is up to half a step where weights were rounded to the
    nearest, and up to a whole one is kept where their inputs were in view."""
    left = (weight.float() - coarse.dequantized()).unflatten(1, (-1, GROUP_SIZE))
    steps = left.div_(coarse.grids()[0].unsqueeze(-1)).mul_(FINER_STEPS).add_(FURTHER_MIDDLE)
    return RefinedMatrix(coarse, steps.round_().clamp_(0, 2 * FURTHER_MIDDLE - 1).to(torch.uint8).flatten(1))


Rounding = Mapping[Action, Mapping[Place, GroupedMatrix]]
"""Matrices that were rounded with their inputs in view, by action and place. All others are rounded to the nearest."""


def only(rounding: Rounding, actions: Collection[Action]) -> Rounding:
    """Returns the matrices of these actions: unpacking takes time and memory."""
    return {action: own for action, own in rounding.items() if action in actions}


def zero_point(bits: int) -> int:
    """Returns the value in the middle of the range of so many bits."""
    return int(2 ** (bits - 1))


def joined_outputs(parts: Iterable[GroupedMatrix]) -> GroupedMatrix:
    """Returns the matrix that has the rows of all parts, which have as many bits."""
    own = list(parts)
    tensors = zip(*(part.tensors().values() for part in own), strict=True)
    return _grouped(map(torch.cat, tensors), own[0].bits)


def _grouped(tensors: Iterable[Tensor], bits: int) -> GroupedMatrix:
    values, scales, offsets, units = tensors
    return GroupedMatrix(values, scales, offsets, units, bits)


def quantize_grouped(weight: Tensor, bits: int) -> GroupedMatrix:
    """Rounds `[out, in]` to values of so many bits in groups of 32 inputs, by the least squared error."""
    return _quantize_in_parts(weight, bits, None)


def quantize_int4_with_rest(weight: Tensor, repeated: Tensor) -> GroupedMatrix:
    """Rounds a matrix to INT4 that has the inputs `repeated`, int64 `[n]`, again at its end, with what the rounding
    left of their weights. So their products are about as exact as in INT8."""
    matrix = quantize_grouped(weight, 4)
    left = weight[:, repeated].float() - matrix.dequantized(repeated)
    rest = _quantize_in_parts(left, 4, matrix.units)
    pairs = (matrix.values, rest.values), (matrix.scales, rest.scales), (matrix.offsets, rest.offsets)
    values, scales, offsets = (torch.cat(pair, dim=1) for pair in pairs)
    return GroupedMatrix(values, scales, offsets, matrix.units)


def _quantize_in_parts(weight: Tensor, bits: int, units: Tensor | None) -> GroupedMatrix:
    # A few rows at a time stay in the processor's cache.
    rows = weight.split(_ROWS_TOGETHER)
    own_units = [None] * len(rows) if units is None else units.split(_ROWS_TOGETHER)
    return joined_outputs(_quantize_groups(own.float(), bits, unit) for own, unit in zip(rows, own_units, strict=True))


def _quantize_groups(weight: Tensor, bits: int, units: Tensor | None) -> GroupedMatrix:
    """Rounds some rows, float32, in units that are given or fit each row's scales."""
    groups = weight.view(len(weight), -1, GROUP_SIZE)
    fitted, zeros, centres = _fit_grids(groups, bits)
    # A group whose weights are all alike may lie outside the grid of its own range.
    scales = torch.maximum(fitted, zeros.abs() * (OFFSETS_IN_STEP / MOST_OFFSET))
    if units is None:
        units = scales.amax(dim=1) / MOST_SCALE
    steps = (scales / units.unsqueeze(1)).round_().clamp_(1, MOST_SCALE)
    scales = steps * units.unsqueeze(1)
    # Where the values stay, the group keeps its mean.
    keeps_values = (scales - fitted).abs() < _KEEPS_VALUES * fitted
    zeros = torch.where(keeps_values, zeros + centres * (fitted - scales), zeros)
    offsets = (zeros / scales * OFFSETS_IN_STEP).round_().clamp_(-MOST_OFFSET - 1, MOST_OFFSET)
    values = _rounded_to_grid(groups, scales, scales * offsets / OFFSETS_IN_STEP, bits).to(torch.uint8)
    return GroupedMatrix(values.view(weight.shape), steps.to(torch.int16), offsets.to(torch.int16), units, bits)


def _fit_grids(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each group's scale and zero, and the mean of its values less the zero point.

    Begins with the grid from a group's least weight to its greatest. Then it fits scale and zero to the rounded values
    by least squares, and rounds to the new grid, in turn.
    """
    low, middle = groups.amin(dim=-1), zero_point(bits)
    scales = ((groups.amax(dim=-1) - low) / (2**bits - 1)).clamp_min(1e-8)
    zeros = low + middle * scales
    means = groups.mean(dim=-1)
    centred = groups - means.unsqueeze(-1)
    rounded = _rounded_to_grid(groups, scales, zeros, bits)
    is_settled = torch.zeros_like(scales, dtype=torch.bool)
    for number in range(_GRID_FITS):
        value_means = rounded.mean(dim=-1)
        values = rounded.sub_(value_means.unsqueeze(-1))
        power = torch.linalg.vecdot(values, values)
        fitted = (torch.linalg.vecdot(values, centred) / power.clamp_min(1e-8)).clamp_min(1e-8)
        is_settled |= power == 0
        if number:
            is_settled |= (fitted - scales).abs() < _SETTLED * scales
        before = scales
        scales = torch.where(is_settled, scales, fitted)
        zeros = torch.where(is_settled, zeros, means - (value_means - middle) * fitted)
        rounded = _rounded_to_grid(groups, scales, zeros, bits)
        if torch.equal(scales, before):  # they were grids of this kind before, as in a Q4_1 file
            break
    return scales, zeros, rounded.mean(dim=-1) - middle


def _rounded_to_grid(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    offsets = (groups - zeros.unsqueeze(-1)).div_(scales.unsqueeze(-1))
    return offsets.add_(zero_point(bits)).round_().clamp_(0, 2**bits - 1)


def is_nearly_exact(weight: Tensor) -> bool:
    """Returns True if INT4 hardly changes a matrix, as one that was read from a file of four bits.

    Looks at some of the outputs.
    """
    some = weight[:: max(1, len(weight) // _NUM_CHECKED)].float()
    error = (quantize_grouped(some, 4).dequantized() - some).square().mean()
    is_small = error <= _NEARLY_EXACT**2 * some.square().mean()
    return torch.equal(is_small, torch.ones_like(is_small))
