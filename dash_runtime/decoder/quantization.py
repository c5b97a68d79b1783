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
INT8_INPUT_MULTIPLE = 16
"""The CPU's INT8 kernel reads past the end of a row whose length is not a multiple of this."""
_INT4_ZERO_POINT = 8
_CUDA_K_TILE = 16
_CUDA_INNER_K_TILES = (8, 4, 2)
MAX_ALIKE_ROWS = 256
"""A row of the packed bf16 product has the same numbers in a pass of up to so many rows."""
_USUAL_ROWS = 64
_TRIED_OUTPUTS = 1 << 15
_ALIKE: dict[tuple[tuple[int, int], int, int], bool] = {}
"""By the matrix's shape, the number of rows and that of threads: whether each row has its usual sums."""


class Linear(Protocol):
    """`[rows, in_features] -> [rows, out_features]`, bias included."""

    def __call__(self, inputs: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class FullLinear:
    """The weights as loaded. `weight` is `[out_features, in_features]`."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedFullLinear:
    """The bf16 weights in the blocked layout that oneDNN would otherwise make anew for every product.

    A row's result never depends on its neighbours, up to `MAX_ALIKE_ROWS` in all. For some numbers of rows oneDNN sums
    in another order than for others, as it does when it splits a long sum between threads. Which ones these are is
    found by trying, when such a number first comes: they are given to it in parts, or with rows that nobody wants.
    """

    packed: Tensor
    bias: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def from_full(cls, full: FullLinear) -> "PackedFullLinear":
        out_features, in_features = full.weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(full.weight, 1)
        return cls(packed, full.bias, (out_features, in_features))

    def __call__(self, inputs: Tensor) -> Tensor:
        num_rows = len(inputs)
        if num_rows > MAX_ALIKE_ROWS or self._is_alike(num_rows):
            return _packed_linear(inputs, self.packed, self.bias)
        if num_rows > _USUAL_ROWS:
            part = _USUAL_ROWS if num_rows <= 2 * _USUAL_ROWS else 2 * _USUAL_ROWS
            return torch.cat([self(rows) for rows in inputs.split(part)])
        if num_rows == 1:
            return self(inputs.expand(2, -1))[:1]
        return self(functional.pad(inputs, (0, 0, 0, _USUAL_ROWS - num_rows)))[:num_rows]

    def _is_alike(self, num_rows: int) -> bool:
        """Whether each of so many rows has the sums that it has among the usual number."""
        if num_rows == _USUAL_ROWS:
            return True
        key = (self.shape, num_rows, torch.get_num_threads())
        if key not in _ALIKE:
            _ALIKE[key] = self._try(num_rows)
        return _ALIKE[key]

    def _try(self, num_rows: int) -> bool:
        out_features, in_features = self.shape
        inputs = _probed_rows(in_features)[: -(-num_rows // _USUAL_ROWS) * _USUAL_ROWS]
        # Another order shows in a few outputs of a thousand, so a few rows are tried several times over.
        num_tries = min(len(inputs) // num_rows, -(-_TRIED_OUTPUTS // (num_rows * out_features)))
        tried = inputs[: num_tries * num_rows]
        outputs = (
            torch.cat([_packed_linear(part, self.packed, self.bias) for part in rows.split(together)])
            for rows, together in ((inputs, _USUAL_ROWS), (tried, num_rows))
        )
        usual, own = outputs
        return torch.equal(usual[: len(own)], own)


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
            packed = torch._convert_weight_to_int4pack(pairs.contiguous(), cuda_inner_k_tiles(full.weight.shape[1]))
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(quantized, 1)
        return cls(packed, scales_and_zeros, full.bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        matmul = torch.ops.aten._weight_int4pack_mm if inputs.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        outputs = matmul(inputs, self.packed, INT4_GROUP_SIZE, self.scales_and_zeros)
        return outputs if self.bias is None else outputs + self.bias


_QUANTIZED: dict[Action, type[Int8Linear] | type[Int4Linear]] = {
    Action.INT8: Int8Linear,
    Action.INT4: Int4Linear,
}


def make_linear(action: Action, full: FullLinear) -> Linear:
    """The linear layer that `action` runs for the matrix `full`, with the kernel that this device is fastest with."""
    if action is not Action.FULL:
        return _QUANTIZED[action].from_full(full)
    is_bf16_on_cpu = full.weight.device.type == "cpu" and full.weight.dtype is torch.bfloat16
    return PackedFullLinear.from_full(full) if is_bf16_on_cpu and _has_packed_linear() else full


def _packed_linear(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


@lru_cache
def _has_packed_linear() -> bool:
    """Whether this build of torch has oneDNN with bf16, which is checked against the plain product."""
    inputs, weight = _probe(16, 64, 32)
    try:
        outputs = _packed_linear(inputs, torch.ops.mkldnn._reorder_linear_weight(weight, 1), None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(outputs.float(), functional.linear(inputs.float(), weight.float()), atol=0.5)


@lru_cache
def _probed_rows(in_features: int) -> Tensor:
    return _probe(MAX_ALIKE_ROWS, 1, in_features)[0]


def _probe(num_rows: int, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Some bf16 inputs and a weight, always the same."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    return torch.randn(num_rows, in_features, generator=generator).bfloat16(), weight.bfloat16()


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


def cuda_inner_k_tiles(in_features: int) -> int:
    """How many tiles of 16 inputs CUDA's INT4 kernel packs together: the most that the row is a multiple of.

    Raises:
        NotImplementedError: it is a multiple of none.
    """
    for tiles in _CUDA_INNER_K_TILES:
        if in_features % (tiles * _CUDA_K_TILE) == 0:
            return tiles
    raise NotImplementedError(f"CUDA's INT4 kernel takes no rows of {in_features} inputs")


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
    if action is Action.INT8 and in_features % INT8_INPUT_MULTIPLE:
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
