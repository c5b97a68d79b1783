"""Rounds a matrix to INT4: four bits a weight and 16 more for each group of 32 inputs.

Knows matrices; knows no layers and no kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

INT4_GROUP_SIZE = 32
LANES = 16
"""Outputs that native code computes together, and the tokens of a head's tile."""
INT4_ZERO_POINT = 8
_GRID_FITS = 3
_SETTLED = 1e-3
"""A scale that a second fit would move by less than this share of itself stays."""
_KEEPS_VALUES = 0.1
"""A scale that moves by less than this share of itself leaves nearly all values."""
INT4_SCALE_BITS, INT4_OFFSET_BITS = 7, 9
"""Bits of a group's grid. What a wrong offset does adds up over a group."""
MOST_INT4_SCALE, MOST_INT4_OFFSET = 2**INT4_SCALE_BITS - 1, 2 ** (INT4_OFFSET_BITS - 1) - 1
INT4_OFFSETS_IN_STEP = 32
_ROWS_TOGETHER = 512
_NUM_CHECKED = 64
_NEARLY_EXACT = 0.02
"""An error of INT4, as a share of the weights: 0.004 of Q4_0's, and 0.07 to 0.1 of those of other files."""

Place = tuple[int, int]
"""A layer, and the number of a matrix in it (`Linears.mapped_by_place`)."""


def is_packable(out_features: int, in_features: int) -> bool:
    """Returns True if native code can take a matrix of this shape."""
    return out_features % LANES == 0 and in_features % INT4_GROUP_SIZE == 0


class Int4Matrix(NamedTuple):
    """A matrix `[out, in]` in groups of 32 inputs: `weight ≈ (value − 8 + offset / 32) · scale · unit`.

    A group has its grid in 16 bits, and 4.5 bits are a weight's.
    """

    values: Tensor
    """uint8 `[out, in]`, 0…15."""
    scales: Tensor
    """int16 `[out, in / 32]`, 1…127."""
    offsets: Tensor
    """int16 `[out, in / 32]`, −256…255."""
    units: Tensor
    """float32 `[out]`."""

    def grids(self) -> tuple[Tensor, Tensor]:
        """Returns float32 scales and zeros `[out, in / 32]`: `weight ≈ (value − 8) · scale + zero`."""
        scales = self.scales * self.units.unsqueeze(1)
        return scales, scales * self.offsets / INT4_OFFSETS_IN_STEP

    def outputs(self, first: int, last: int | None) -> "Int4Matrix":
        """Returns some of its rows."""
        return Int4Matrix(*(own[first:last] for own in self))

    def to(self, device: torch.device) -> "Int4Matrix":
        """Returns it on a device."""
        return Int4Matrix(*(own.to(device) for own in self))

    def dequantized(self, inputs: Tensor | None = None) -> Tensor:
        """Returns the float32 matrix `[out, in]`, or only its columns of some inputs, int64 `[n]`."""
        columns = torch.arange(self.values.shape[1], device=self.values.device) if inputs is None else inputs
        scales, zeros = (own[:, columns // INT4_GROUP_SIZE] for own in self.grids())
        return (self.values[:, columns].float() - INT4_ZERO_POINT).mul_(scales).add_(zeros)


def quantize_int4(weight: Tensor) -> Int4Matrix:
    """Rounds `[out, in]` to 0…15 in groups of 32 inputs, by the least squared error."""
    return _quantize_in_parts(weight, None)


def quantize_int4_with_rest(weight: Tensor, repeated: Tensor) -> Int4Matrix:
    """Does `quantize_int4` for a matrix that has the inputs `repeated`, int64 `[n]`, again at its end, with what the
    rounding left of their weights. So their products are about as exact as in INT8."""
    matrix = quantize_int4(weight)
    rest = _quantize_in_parts(weight[:, repeated].float() - matrix.dequantized(repeated), matrix.units)
    values, scales, offsets = (torch.cat(both, dim=1) for both in zip(matrix[:3], rest[:3], strict=True))
    return Int4Matrix(values, scales, offsets, matrix.units)


def _quantize_in_parts(weight: Tensor, units: Tensor | None) -> Int4Matrix:
    # A few rows at a time stay in the processor's cache.
    rows = weight.split(_ROWS_TOGETHER)
    own_units = [None] * len(rows) if units is None else units.split(_ROWS_TOGETHER)
    parts = [_quantize_groups(own.float(), unit) for own, unit in zip(rows, own_units, strict=True)]
    return Int4Matrix(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _quantize_groups(weight: Tensor, units: Tensor | None) -> Int4Matrix:
    """Does `quantize_int4` for some rows, float32, in units that are given or fit each row's scales."""
    groups = weight.view(len(weight), -1, INT4_GROUP_SIZE)
    fitted, zeros, centres = _fit_grids(groups)
    # A group whose weights are all alike may lie outside the grid of its own range.
    scales = torch.maximum(fitted, zeros.abs() * (INT4_OFFSETS_IN_STEP / MOST_INT4_OFFSET))
    if units is None:
        units = scales.amax(dim=1) / MOST_INT4_SCALE
    steps = (scales / units.unsqueeze(1)).round_().clamp_(1, MOST_INT4_SCALE)
    scales = steps * units.unsqueeze(1)
    # Where the values stay, the group keeps its mean.
    keeps_values = (scales - fitted).abs() < _KEEPS_VALUES * fitted
    zeros = torch.where(keeps_values, zeros + centres * (fitted - scales), zeros)
    offsets = (zeros / scales * INT4_OFFSETS_IN_STEP).round_().clamp_(-MOST_INT4_OFFSET - 1, MOST_INT4_OFFSET)
    values = _rounded_to_grid(groups, scales, scales * offsets / INT4_OFFSETS_IN_STEP).to(torch.uint8)
    return Int4Matrix(values.view(weight.shape), steps.to(torch.int16), offsets.to(torch.int16), units)


def _fit_grids(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each group's scale and zero, and the mean of its values less 8.

    Begins with the grid from a group's least weight to its greatest. Then it fits scale and zero to the rounded values
    by least squares, and rounds to the new grid, in turn.
    """
    low = groups.amin(dim=-1)
    scales = ((groups.amax(dim=-1) - low) / 15).clamp_min(1e-8)
    zeros = low + INT4_ZERO_POINT * scales
    means = groups.mean(dim=-1)
    centred = groups - means.unsqueeze(-1)
    rounded = _rounded_to_grid(groups, scales, zeros)
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
        zeros = torch.where(is_settled, zeros, means - (value_means - INT4_ZERO_POINT) * fitted)
        rounded = _rounded_to_grid(groups, scales, zeros)
        if torch.equal(scales, before):  # they were grids of this kind before, as in a Q4_1 file
            break
    return scales, zeros, rounded.mean(dim=-1) - INT4_ZERO_POINT


def _rounded_to_grid(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    offsets = (groups - zeros.unsqueeze(-1)).div_(scales.unsqueeze(-1))
    return offsets.add_(INT4_ZERO_POINT).round_().clamp_(0, 15)


def is_nearly_exact(weight: Tensor) -> bool:
    """Returns True if INT4 hardly changes a matrix, as one that was read from a file of four bits.

    Looks at some of the outputs.
    """
    some = weight[:: max(1, len(weight) // _NUM_CHECKED)].float()
    error = (quantize_int4(some).dequantized() - some).square().mean()
    is_small = error <= _NEARLY_EXACT**2 * some.square().mean()
    return torch.equal(is_small, torch.ones_like(is_small))
