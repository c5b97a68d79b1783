"""Linear layers in FULL, INT8 and INT4, on PyTorch's packed weight-only kernels.

Knows matrices; knows no layers and no policies. What a device has no kernel for is not offered:
`supported_actions` runs each kernel once and compares it with the matrix that it stands for.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action

INT4_GROUP_SIZE = 32
_INT4_ZERO_POINT = 8
_CUDA_INNER_K_TILES = 8
_NUM_PROBED_ROWS = 64
_MAX_PROBED_OUTPUTS = 4096


class Linear(Protocol):
    """`[rows, in_features] -> [rows, out_features]`, bias included."""

    def __call__(self, inputs: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class FullLinear:
    """The weights as loaded. `weight` is `[out_features, in_features]`.

    `doubles_single_rows` is set where the kernel sums a single row in another order than one of several (see
    `full_linear`): such a row is then given to it twice, so that a row's result never depends on its neighbours.
    """

    weight: Tensor
    bias: Tensor | None = None
    doubles_single_rows: bool = False

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.doubles_single_rows and len(inputs) == 1:
            return functional.linear(inputs.expand(2, -1), self.weight, self.bias)[:1]
        return functional.linear(inputs, self.weight, self.bias)


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
        outputs = torch.ops.aten._weight_int8pack_mm(inputs, self.weight, self.scales)
        return outputs if self.bias is None else outputs + self.bias


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """Asymmetric INT4 weights in groups of 32 inputs, packed for the device's kernel.

    Raises NotImplementedError or RuntimeError where the device or the shape has no kernel.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    bias: Tensor | None = None

    @classmethod
    def from_full(cls, full: FullLinear) -> "Int4Linear":
        quantized, scales, zeros = quantize_int4(full.weight)
        scales_and_zeros = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous()
        if full.weight.is_cuda:
            pairs = (quantized[:, ::2] << 4 | quantized[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs.contiguous(), _CUDA_INNER_K_TILES)
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(quantized, 1)
        return cls(packed, scales_and_zeros, full.bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        matmul = torch.ops.aten._weight_int4pack_mm if inputs.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        outputs = matmul(inputs, self.packed, INT4_GROUP_SIZE, self.scales_and_zeros)
        return outputs if self.bias is None else outputs + self.bias


def full_linear(weight: Tensor, bias: Tensor | None = None) -> FullLinear:
    """A FULL linear layer that treats a row alike alone and among others, which is promised for bf16.

    oneDNN splits the sum over many inputs between threads when there is a single row, and rounds elsewhere then;
    on the embedded model that is the down projection, for which two rows cost no more than one.
    """
    is_bf16_on_cpu = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
    return FullLinear(weight, bias, is_bf16_on_cpu and _rounds_single_rows_apart(tuple(weight.shape)))


@lru_cache
def _rounds_single_rows_apart(shape: tuple[int, int]) -> bool:
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = min(shape[0], _MAX_PROBED_OUTPUTS), shape[1]
    weight = torch.randn(out_features, in_features, generator=generator).to(torch.bfloat16)
    rows = torch.randn(_NUM_PROBED_ROWS, in_features, generator=generator).to(torch.bfloat16)
    together = functional.linear(rows, weight)
    return not torch.equal(together, torch.cat([functional.linear(row, weight) for row in rows.split(1)]))


_QUANTIZED: dict[Action, type[Int8Linear] | type[Int4Linear]] = {
    Action.INT8: Int8Linear,
    Action.INT4: Int4Linear,
}


def make_linear(action: Action, full: FullLinear) -> Linear:
    """The linear layer that `action` runs instead of `full`, which for FULL is `full` itself."""
    return full if action is Action.FULL else _QUANTIZED[action].from_full(full)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds `[out, in]` to int8; returns it with its scales `[out]` in the weight's dtype."""
    scales = weight.float().abs().amax(dim=1).clamp_min(1e-8) / 127
    scales = scales.to(weight.dtype)
    quantized = torch.round(weight.float() / scales.float().unsqueeze(1)).clamp(-127, 127)
    return quantized.to(torch.int8).contiguous(), scales


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds `[out, in]` to 0…15 in groups of 32 inputs.

    Returns the int32 values `[out, in]`, scales and zeros `[out, in / 32]` in the weight's dtype, with
    `weight ≈ (value − 8) · scale + zero`.
    """
    out_features, in_features = weight.shape
    groups = weight.float().view(out_features, in_features // INT4_GROUP_SIZE, INT4_GROUP_SIZE)
    low = groups.amin(dim=-1)
    scales = ((groups.amax(dim=-1) - low) / 15).clamp_min(1e-8).to(weight.dtype)
    zeros = (low + _INT4_ZERO_POINT * scales.float()).to(weight.dtype)
    offsets = (groups - zeros.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)
    quantized = torch.round(offsets + _INT4_ZERO_POINT).clamp(0, 15)
    return quantized.to(torch.int32).view(out_features, in_features).contiguous(), scales, zeros


def dequantize_int4(quantized: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The float32 matrix `[out, in]` that `quantize_int4` rounded to."""
    groups = quantized.view(*scales.shape, INT4_GROUP_SIZE).float() - _INT4_ZERO_POINT
    return (groups * scales.float().unsqueeze(-1) + zeros.float().unsqueeze(-1)).view(quantized.shape)


def supported_actions(device: torch.device, dtype: torch.dtype, shapes: "set[tuple[int, int]]") -> tuple[Action, ...]:
    """The actions with a real kernel for these `(out_features, in_features)`, cheapest first.

    SKIP and FULL need none. Each other one runs once per shape on this device and must agree with its own
    dequantised matrix; a kernel that is missing, refuses, or answers something else is not offered.
    """
    kernels = [action for action in _QUANTIZED if all(_kernel_works(action, shape, device, dtype) for shape in shapes)]
    return tuple(sorted((Action.SKIP, *kernels, Action.FULL)))


def _kernel_works(action: Action, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
    out_features, in_features = shape
    if action is Action.INT4 and (in_features % INT4_GROUP_SIZE or out_features % 16):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(min(out_features, 1024), in_features, generator=generator).to(device, dtype)
    inputs = torch.randn(3, in_features, generator=generator).to(device, dtype)
    try:
        outputs = make_linear(action, FullLinear(weight))(inputs)
    except (NotImplementedError, RuntimeError):
        return False
    if action is Action.INT8:
        quantized, scales = quantize_int8(weight)
        rounded = quantized.float() * scales.float().unsqueeze(1)
    else:
        rounded = dequantize_int4(*quantize_int4(weight))
    expected = inputs.float() @ rounded.T
    return bool((outputs.float() - expected).abs().max() < 0.02 * expected.abs().max())
