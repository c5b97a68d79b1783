"""Linear layers in INT8 and INT4, on PyTorch's packed weight-only kernels, and for many rows on its dense product.

Actions without a kernel on the device are not offered: `supported_actions` runs each kernel once and compares it with
the dequantised matrix. Knows matrices; knows no layers and no policies.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.devices import device_of
from dash_runtime.linears import dense_linear
from dash_runtime.linears.dense_linear import FullLinear, Linear, make_full_linear, unpacked_product

INT4_GROUP_SIZE = 32
INT8_INPUT_MULTIPLE = 16
"""The CPU's INT8 kernel reads past the end of a row whose length is not a multiple of this."""
_INT4_ZERO_POINT = 8
_GRID_FITS = 3
_SETTLED = 1e-3
"""A scale that a second fit would move by less than this share of itself stays."""
_KEEPS_VALUES = 0.1
"""A scale that moves by less than this share of itself leaves nearly all values."""
INT4_SCALE_BITS, INT4_OFFSET_BITS = 7, 9
"""Bits of a group's grid. What a wrong offset does adds up over a group."""
_MOST_SCALE, _MOST_OFFSET = 2**INT4_SCALE_BITS - 1, 2 ** (INT4_OFFSET_BITS - 1) - 1
_OFFSETS_IN_STEP = 32
_ROWS_TOGETHER = 512
_NUM_CHECKED = 64
_NEARLY_EXACT = 0.02
"""An error of INT4, as a share of the weights: 0.004 of Q4_0's, and 0.07 to 0.1 of those of other files."""
_MANY_ROWS = 32
"""From so many rows on, the CPU unpacks a whole matrix in less time than its kernels take, which do so for every few
rows. With 128 rows a kernel takes three to ten times as long as a product in bf16."""


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """Symmetric INT8 weights, one scale per output channel; activations stay as they are."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None = None

    @classmethod
    def from_full(cls, full: FullLinear) -> "Int8Linear":
        quantized, scales = quantize_int8(full.weight)
        return cls(quantized, scales, full.bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        return _biased(torch.ops.aten._weight_int8pack_mm(inputs, self.weight, self.scales), self.bias)

    def many_rows(self, inputs: Tensor) -> Tensor:
        """Returns the same by the dense product. bf16 holds the values exactly."""
        sums = unpacked_product(inputs, lambda values: values.to(inputs.dtype), self.weight)
        return _biased(sums.mul_(self.scales), self.bias)


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """Asymmetric INT4 weights in groups of 32 inputs, packed for the device's kernel.

    Raises NotImplementedError or RuntimeError if there is no kernel for the device or the shape.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    bias: Tensor | None = None
    values: Tensor | None = None
    """The rounded weights less 8, int8 `[out, groups, 32]`, on a device where many rows are better unpacked."""

    @classmethod
    def from_full(cls, full: FullLinear) -> "Int4Linear":
        return cls.of(quantize_int4(full.weight), full.weight.dtype, full.bias)

    @classmethod
    def of(cls, matrix: "Int4Matrix", dtype: torch.dtype, bias: Tensor | None = None) -> "Int4Linear":
        """Packs a matrix for inputs of `dtype`, to which scales and zeros are rounded."""
        scales_and_zeros = torch.stack(matrix.grids(), dim=-1).to(dtype).transpose(0, 1).contiguous()
        device = device_of(matrix.units.device)
        values = None
        if device.unpacks_for_many_rows:
            values = (matrix.values.to(torch.int8) - _INT4_ZERO_POINT).unflatten(1, (-1, INT4_GROUP_SIZE))
        return cls(device.pack_int4(matrix.values.to(torch.int32)), scales_and_zeros, bias, values)

    def __call__(self, inputs: Tensor) -> Tensor:
        product = device_of(inputs.device).int4_product
        return _biased(product(inputs, self.packed, INT4_GROUP_SIZE, self.scales_and_zeros), self.bias)

    def many_rows(self, inputs: Tensor) -> Tensor:
        """Returns the same by the dense product, from weights that are rounded once more to the dtype of `inputs`."""
        assert self.values is not None
        grids = self.scales_and_zeros.transpose(0, 1).unsqueeze(-1)  # [out, groups, 2, 1]

        def unpack(values: Tensor, grid: Tensor) -> Tensor:
            return values.to(inputs.dtype).mul_(grid[:, :, 0]).add_(grid[:, :, 1]).flatten(1)

        return _biased(unpacked_product(inputs, unpack, self.values, grids), self.bias)


@dataclass(frozen=True, slots=True)
class JoinedLinear:
    """Matrices with the same inputs, whose outputs follow each other."""

    parts: tuple[Linear, ...]

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.cat([part(inputs) for part in self.parts], dim=-1)


@dataclass(frozen=True, slots=True)
class ManyRowsLinear:
    """A rounded matrix for passes over many rows. A few rows run its kernel."""

    few_rows: Int8Linear | Int4Linear

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.few_rows(inputs) if len(inputs) < _MANY_ROWS else self.few_rows.many_rows(inputs)


def _biased(outputs: Tensor, bias: Tensor | None) -> Tensor:
    return outputs if bias is None else outputs + bias


_QUANTIZED: dict[Action, type[Int8Linear] | type[Int4Linear]] = {Action.INT8: Int8Linear, Action.INT4: Int4Linear}


def make_linear(action: Action, full: FullLinear) -> Linear:
    """Returns the linear layer that `action` runs for the matrix `full`, with this device's fastest kernel."""
    if action is Action.FULL:
        return make_full_linear(full)
    parts = [_QUANTIZED[precision].from_full(part) for precision, part in quantized_parts(action, full)]
    return parts[0] if len(parts) == 1 else JoinedLinear(tuple(parts))


def quantized_parts(action: Action, full: FullLinear) -> list[tuple[Action, FullLinear]]:
    """Returns the precision of each part of a matrix's outputs that `action`, INT8 or INT4, runs, in their order."""
    first = full.finer_from
    if action is Action.INT8 or first is None:
        return [(action, full)]
    rough = [(Action.INT4, full.outputs(0, first))] if first else []
    return [*rough, (Action.INT8, full.outputs(first))]


def for_many_rows(linear: Linear) -> Linear:
    """Returns the same matrix for passes over many rows. A row's sums may differ from those in decoding."""
    if isinstance(linear, Int8Linear) and device_of(linear.weight.device).unpacks_for_many_rows:
        return ManyRowsLinear(linear)
    if isinstance(linear, Int4Linear) and linear.values is not None:
        return ManyRowsLinear(linear)
    if isinstance(linear, JoinedLinear):
        return JoinedLinear(tuple(map(for_many_rows, linear.parts)))
    return dense_linear.for_many_rows(linear)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds `[out, in]` to int8; returns it with its scales `[out]` in the weight's dtype."""
    scales = weight.float().abs().amax(dim=1).clamp_min(1e-8) / 127
    scales = scales.to(weight.dtype)
    quantized = torch.round(weight.float() / scales.float().unsqueeze(1)).clamp(-127, 127)
    return quantized.to(torch.int8).contiguous(), scales


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
        return scales, scales * self.offsets / _OFFSETS_IN_STEP

    def dequantized(self, inputs: Tensor | None = None) -> Tensor:
        """Returns the float32 matrix `[out, in]`, or only its columns of some inputs, int64 `[n]`."""
        columns = torch.arange(self.values.shape[1], device=self.values.device) if inputs is None else inputs
        scales, zeros = (own[:, columns // INT4_GROUP_SIZE] for own in self.grids())
        return (self.values[:, columns].float() - _INT4_ZERO_POINT).mul_(scales).add_(zeros)


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
    scales = torch.maximum(fitted, zeros.abs() * (_OFFSETS_IN_STEP / _MOST_OFFSET))
    if units is None:
        units = scales.amax(dim=1) / _MOST_SCALE
    steps = (scales / units.unsqueeze(1)).round_().clamp_(1, _MOST_SCALE)
    scales = steps * units.unsqueeze(1)
    # Where the values stay, the group keeps its mean.
    keeps_values = (scales - fitted).abs() < _KEEPS_VALUES * fitted
    zeros = torch.where(keeps_values, zeros + centres * (fitted - scales), zeros)
    offsets = (zeros / scales * _OFFSETS_IN_STEP).round_().clamp_(-_MOST_OFFSET - 1, _MOST_OFFSET)
    values = _rounded_to_grid(groups, scales, scales * offsets / _OFFSETS_IN_STEP).to(torch.uint8)
    return Int4Matrix(values.view(weight.shape), steps.to(torch.int16), offsets.to(torch.int16), units)


def _fit_grids(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each group's scale and zero, and the mean of its values less 8.

    Begins with the grid from a group's least weight to its greatest. Then it fits scale and zero to the rounded values
    by least squares, and rounds to the new grid, in turn.
    """
    low = groups.amin(dim=-1)
    scales = ((groups.amax(dim=-1) - low) / 15).clamp_min(1e-8)
    zeros = low + _INT4_ZERO_POINT * scales
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
        zeros = torch.where(is_settled, zeros, means - (value_means - _INT4_ZERO_POINT) * fitted)
        rounded = _rounded_to_grid(groups, scales, zeros)
        if torch.equal(scales, before):  # they were grids of this kind before, as in a Q4_1 file
            break
    return scales, zeros, rounded.mean(dim=-1) - _INT4_ZERO_POINT


def _rounded_to_grid(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    offsets = (groups - zeros.unsqueeze(-1)).div_(scales.unsqueeze(-1))
    return offsets.add_(_INT4_ZERO_POINT).round_().clamp_(0, 15)


def is_nearly_exact(weight: Tensor) -> bool:
    """Returns True if INT4 hardly changes a matrix, as one that was read from a file of four bits.

    Looks at some of the outputs.
    """
    some = weight[:: max(1, len(weight) // _NUM_CHECKED)].float()
    error = (quantize_int4(some).dequantized() - some).square().mean()
    is_small = error <= _NEARLY_EXACT**2 * some.square().mean()
    return torch.equal(is_small, torch.ones_like(is_small))


def rounded_linear(action: Action, full: FullLinear) -> FullLinear:
    """Returns the matrix that `action`, INT8 or INT4, computes with, in the weight's dtype."""
    parts = [rounded_matrix(precision, part.weight) for precision, part in quantized_parts(action, full)]
    return FullLinear(parts[0] if len(parts) == 1 else torch.cat(parts), full.bias)


def rounded_matrix(action: Action, weight: Tensor) -> Tensor:
    """Returns the matrix that INT8 or INT4 computes with, in the weight's dtype."""
    if action is Action.INT4:
        return quantize_int4(weight).dequantized().to(weight.dtype)
    quantized, scales = quantize_int8(weight)
    return (quantized.float() * scales.float().unsqueeze(1)).to(weight.dtype)


def supported_actions(device: torch.device, dtype: torch.dtype, shapes: "set[tuple[int, int]]") -> tuple[Action, ...]:
    """Returns the actions with a real kernel for these `(out_features, in_features)`, cheapest first.

    SKIP and FULL need none. Each other one runs once per shape on this device and must agree with its own dequantised
    matrix. It is not offered if its kernel is missing, refuses, or disagrees.
    """
    kernels = [action for action in _QUANTIZED if all(_kernel_works(action, shape, device, dtype) for shape in shapes)]
    return tuple(sorted((Action.SKIP, *kernels, Action.FULL)))


def _kernel_works(action: Action, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
    out_features, in_features = shape
    if action is Action.INT4 and (in_features % INT4_GROUP_SIZE or out_features % 16):
        return False
    if action is Action.INT8 and in_features % INT8_INPUT_MULTIPLE:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(min(out_features, 1024), in_features, generator=generator).to(device, dtype)
    inputs = torch.randn(3, in_features, generator=generator).to(device, dtype)
    try:
        outputs = make_linear(action, FullLinear(weight))(inputs)
    except (NotImplementedError, RuntimeError):
        return False
    expected = inputs.float() @ rounded_matrix(action, weight).float().T
    if outputs.dtype != dtype:
        return False
    return bool((outputs.float() - expected).abs().max() < 0.02 * expected.abs().max())
