"""Linear layers in INT8, INT4 and INT3, on PyTorch's packed weight-only kernels, and for many rows on its dense
product.

Actions without a kernel on the device are not offered: `supported_actions` runs each kernel once and compares it with
the dequantised matrix. Knows matrices; knows no layers and no policies.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.devices import device_of
from dash_runtime.linears import dense_linear
from dash_runtime.linears.dense_linear import FullLinear, Linear, make_full_linear, unpacked_product
from dash_runtime.linears.grouped_matrix import (
    GROUP_SIZE,
    OFFSET_BITS,
    SCALE_BITS,
    GroupedMatrix,
    quantize_grouped,
    refine,
    zero_point,
)
from dash_runtime.linears.kept_trials import NO_TRIALS, KeptTrials

INT8_INPUT_MULTIPLE = 16
"""The CPU's INT8 kernel reads past the end of a row whose length is not a multiple of this."""
BITS = {Action.INT3: 3, Action.INT4: 4}
"""Bits of a weight, by actions whose matrices are in groups."""
BYTES_BESIDE_INT4 = 0.5
"""Bytes of a weight of a layer in INT8 in native code, which shares the one in INT4."""
_KERNEL_BITS = 4
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
class GroupedLinear:
    """Asymmetric INT4 or INT3 weights in groups of 32 inputs, packed for the device's INT4 kernel.

    Raises NotImplementedError or RuntimeError if there is no kernel for the device or the shape.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    bias: Tensor | None = None
    values: Tensor | None = None
    """The rounded weights less 8, int8 `[out, groups, 32]`, on a device where many rows are better unpacked."""

    @classmethod
    def of(cls, matrix: GroupedMatrix, dtype: torch.dtype, bias: Tensor | None = None) -> "GroupedLinear":
        """Packs a matrix for inputs of `dtype`, to which scales and zeros are rounded."""
        scales, zeros = matrix.grids()
        own_zeros = zeros + (zero_point(_KERNEL_BITS) - matrix.zero_point) * scales
        scales_and_zeros = torch.stack((scales, own_zeros), dim=-1).to(dtype).transpose(0, 1).contiguous()
        device = device_of(matrix.units.device)
        values = None
        if device.unpacks_for_many_rows:
            values = (matrix.values.to(torch.int8) - zero_point(_KERNEL_BITS)).unflatten(1, (-1, GROUP_SIZE))
        return cls(device.pack_int4(matrix.values.to(torch.int32)), scales_and_zeros, bias, values)

    def __call__(self, inputs: Tensor) -> Tensor:
        product = device_of(inputs.device).int4_product
        return _biased(product(inputs, self.packed, GROUP_SIZE, self.scales_and_zeros), self.bias)

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

    few_rows: Int8Linear | GroupedLinear

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.few_rows(inputs) if len(inputs) < _MANY_ROWS else self.few_rows.many_rows(inputs)


def _biased(outputs: Tensor, bias: Tensor | None) -> Tensor:
    return outputs if bias is None else outputs + bias


def bytes_per_weight(action: Action, dtype: torch.dtype, *, is_native: bool) -> float:
    """Returns the bytes that a weight takes in an action's matrices of `dtype`, its share of a group's grid included.
    In INT8 a layer of native code has others (`layer_bytes_per_weight`).

    Args:
        is_native: whether the matrices are packed for native code; else for torch's kernels, whose grids are wider.
    """
    if action in BITS:
        grid = (SCALE_BITS + OFFSET_BITS) / 8 if is_native else 2 * dtype.itemsize
        return BITS[action] / 8 + grid / GROUP_SIZE
    return {Action.SKIP: 0.0, Action.INT8: 1.0, Action.FULL: float(dtype.itemsize)}[action]


def layer_bytes_per_weight(action: Action, dtype: torch.dtype, *, is_native: bool) -> float:
    """Returns the bytes of each of a layer's weights that a row reads; see `bytes_per_weight`."""
    if is_native and action is Action.INT8:
        return BYTES_BESIDE_INT4 + bytes_per_weight(Action.INT4, dtype, is_native=True)
    return bytes_per_weight(action, dtype, is_native=is_native)


def make_linear(action: Action, full: FullLinear, trials: KeptTrials = NO_TRIALS) -> Linear:
    """Returns the linear layer that `action` runs for the matrix `full`, with this device's fastest kernel."""
    if action is Action.FULL:
        return make_full_linear(full, trials)
    parts = [_part(precision, part, trials) for precision, part in quantized_parts(action, full)]
    return parts[0] if len(parts) == 1 else JoinedLinear(tuple(parts))


def _part(precision: Action, full: FullLinear, trials: KeptTrials) -> Linear:
    if precision is Action.FULL:
        return make_full_linear(full, trials)
    if precision is Action.INT8:
        return Int8Linear.from_full(full)
    return GroupedLinear.of(grouped(precision, full), full.weight.dtype, full.bias)


def grouped(action: Action, full: FullLinear) -> GroupedMatrix:
    """Returns the matrix in INT4 or INT3."""
    kept = full.rounded.get(action)
    return quantize_grouped(full.weight, BITS[action]) if kept is None else kept


def quantized_parts(action: Action, full: FullLinear) -> list[tuple[Action, FullLinear]]:
    """Returns the precision of each part of a matrix's outputs that a rounded action runs, in their order.

    Keys and values are few weights, and all later tokens read what they make.
    """
    first = full.keys_from
    of_keys = max(action, full.finer_keys or Action.INT4)
    if first is None or of_keys is action:
        return [(action, full)]
    rough = [(action, full.outputs(0, first))] if first else []
    return [*rough, (of_keys, full.outputs(first))]


def precision_of_keys(kernels: Collection[Action]) -> Action:
    """Returns what INT4 and INT3 leave keys and values in, on a device with kernels for these actions.

    A skipped row still makes them, and INT4 would run a slow INT8 kernel in every layer.
    """
    return Action.INT8 if Action.INT8 in kernels else Action.FULL


def for_many_rows(linear: Linear) -> Linear:
    """Returns the same matrix for passes over many rows. A row's sums may differ from those in decoding."""
    if isinstance(linear, Int8Linear) and device_of(linear.weight.device).unpacks_for_many_rows:
        return ManyRowsLinear(linear)
    if isinstance(linear, GroupedLinear) and linear.values is not None:
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


def through_int8(weight: Tensor) -> Tensor:
    """Returns the float32 matrix that INT8 computes with instead of `[out, in]`."""
    quantized, scales = quantize_int8(weight)
    return quantized.float().mul_(scales.float().unsqueeze(1))


def rounded_linear(action: Action, full: FullLinear) -> FullLinear:
    """Returns the matrix that a rounded action computes with, in the weight's dtype."""
    parts = [_rounded_weight(precision, part) for precision, part in quantized_parts(action, full)]
    return FullLinear(parts[0] if len(parts) == 1 else torch.cat(parts), full.bias)


def refined_linear(full: FullLinear) -> FullLinear:
    """Returns the matrix that native layers in INT8 compute with, in float32: refined from INT4, but for what is finer
    there."""
    parts = [
        refine(part.weight, grouped(precision, part)).dequantized()
        if precision is Action.INT4
        else _rounded_weight(precision, part).float()
        for precision, part in quantized_parts(Action.INT4, full)
    ]
    return FullLinear(torch.cat(parts), full.bias)


def _rounded_weight(action: Action, full: FullLinear) -> Tensor:
    if action is Action.FULL:
        return full.weight
    if action is Action.INT8:
        return through_int8(full.weight).to(full.weight.dtype)
    return grouped(action, full).dequantized().to(full.weight.dtype)


def supported_actions(device: torch.device, dtype: torch.dtype, shapes: "set[tuple[int, int]]") -> tuple[Action, ...]:
    """Returns the actions with a real kernel for these `(out_features, in_features)`, cheapest first.

    SKIP and FULL need none. Each other one runs once per shape on this device and must agree with its own dequantised
    matrix. It is not offered if its kernel is missing, refuses, or disagrees. INT3 is for devices that run native code;
    here it runs as INT4 does, to be judged.
    """
    rounded = [Action.INT4, Action.INT8]
    if device_of(device).runs_native_code:
        rounded.append(Action.INT3)
    kernels = [own for own in rounded if all(_kernel_works(own, shape, device, dtype) for shape in shapes)]
    return tuple(sorted([Action.SKIP, *kernels, Action.FULL]))


def _kernel_works(action: Action, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
    out_features, in_features = shape
    if action in BITS and (in_features % GROUP_SIZE or out_features % 16):
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
    expected = inputs.float() @ rounded_linear(action, FullLinear(weight)).weight.float().T
    if outputs.dtype != dtype:
        return False
    return bool((outputs.float() - expected).abs().max() < 0.02 * expected.abs().max())
