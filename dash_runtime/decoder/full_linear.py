"""Linear layers with the weights as loaded, in the products that a CPU is fastest with for one row and for many.

Knows matrices; knows no layers.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

MAX_ALIKE_ROWS = 256
"""A row of an `AlikeLinear` has the same numbers in a pass of up to so many rows."""
PACKED_BLOCK = 64
"""Outputs that oneDNN lays out together for the CPUs that multiply bf16: word by word of two inputs."""
_USUAL_ROWS = 64
_TRIED_OUTPUTS = 1 << 15
_WIDENED_OUTPUTS = 1 << 10
"""So many outputs are widened at a time: more would not stay in a near cache, and their memory would be asked of the
system every time."""
_ALIKE: dict[tuple[type, tuple[int, int], int, int], bool] = {}
"""By the product, the matrix's shape, the number of rows and that of threads: whether each row has its usual sums."""


class Linear(Protocol):
    """`[rows, in_features] -> [rows, out_features]`, bias included."""

    def __call__(self, inputs: Tensor) -> Tensor: ...


class Product(Linear, Protocol):
    """A linear layer whose sums can be told apart where they were added up in another order."""

    def sums(self, inputs: Tensor) -> Tensor:
        """What is rounded to the result, if that can be had, or the result itself."""
        ...


@dataclass(frozen=True, slots=True)
class FullLinear:
    """The weights as loaded. `weight` is `[out_features, in_features]`."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The bf16 weights in the blocked layout that oneDNN would otherwise make anew for every product."""

    packed: Tensor
    bias: Tensor | None

    @classmethod
    def from_full(cls, full: FullLinear) -> "PackedLinear":
        return cls(torch.ops.mkldnn._reorder_linear_weight(full.weight, 1), full.bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")

    def sums(self, inputs: Tensor) -> Tensor:
        return self(inputs)

    def memory(self) -> Tensor:
        """The packed weights, flat and as they lie; shares their memory.

        Raises AttributeError or RuntimeError where this build of torch does not tell where that is.
        """
        address, size = torch.ops.mkldnn.data_ptr(self.packed), torch.ops.mkldnn._nbytes(self.packed)
        memory: Any = (ctypes.c_ubyte * size).from_address(address)
        memory.owner = self.packed  # a tensor keeps what it is made from
        return torch.frombuffer(memory, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class WidenedLinear:
    """The bf16 weights, widened to float32 for every product.

    Where a CPU multiplies no bf16, PyTorch's own product takes a row as long as the first, however many there are;
    widening takes about as long as one, and the rows then cost a fifth to a tenth each.
    """

    full: FullLinear

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.sums(inputs).to(inputs.dtype)

    def sums(self, inputs: Tensor) -> Tensor:
        bias = None if self.full.bias is None else self.full.bias.float()
        wide = inputs.float()
        parts = [functional.linear(wide, part.float()) for part in self.full.weight.split(_WIDENED_OUTPUTS)]
        sums = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return sums if bias is None else sums + bias


@dataclass(frozen=True, slots=True)
class AlikeLinear:
    """A product in which a row's result never depends on its neighbours, up to `MAX_ALIKE_ROWS` in all.

    For some numbers of rows a library sums in another order than for others, as it does when it splits a long sum
    between threads. Which ones these are is found by trying, when such a number first comes: they are given to it in
    parts, or with rows that nobody wants.
    """

    product: Product
    shape: tuple[int, int]
    """`(out_features, in_features)`"""

    def __call__(self, inputs: Tensor) -> Tensor:
        num_rows = len(inputs)
        if num_rows > MAX_ALIKE_ROWS or self._is_alike(num_rows):
            return self.product(inputs)
        if num_rows > _USUAL_ROWS:
            part = _USUAL_ROWS if num_rows <= 2 * _USUAL_ROWS else 2 * _USUAL_ROWS
            return torch.cat([self(rows) for rows in inputs.split(part)])
        given = next(count for step in (4, 16, _USUAL_ROWS) if self._is_alike(count := -(-num_rows // step) * step))
        return self.product(functional.pad(inputs, (0, 0, 0, given - num_rows)))[:num_rows]

    def _is_alike(self, num_rows: int) -> bool:
        """Whether each of so many rows has the sums that it has among the usual number."""
        if num_rows == _USUAL_ROWS:
            return True
        key = (type(self.product), self.shape, num_rows, torch.get_num_threads())
        if key not in _ALIKE:
            _ALIKE[key] = self._try(num_rows)
        return _ALIKE[key]

    def _try(self, num_rows: int) -> bool:
        out_features, in_features = self.shape
        inputs = _probed_rows(in_features)[: -(-num_rows // _USUAL_ROWS) * _USUAL_ROWS]
        # Another order shows in a few outputs of a thousand, so a few rows are tried several times over.
        num_tries = min(len(inputs) // num_rows, -(-_TRIED_OUTPUTS // (num_rows * out_features)))
        tried = inputs[: num_tries * num_rows]
        usual, own = (
            torch.cat([self.product.sums(part) for part in rows.split(together)])
            for rows, together in ((inputs, _USUAL_ROWS), (tried, num_rows))
        )
        return torch.equal(usual[: len(own)], own)


def make_full_linear(full: FullLinear) -> Linear:
    """What is fastest for few rows, and where it exists also for many."""
    if not _is_bf16_on_cpu(full.weight) or not _has_packed_linear():
        return full
    return AlikeLinear(PackedLinear.from_full(full), _shape(full))


def for_many_rows(linear: Linear) -> Linear:
    """The same matrix for passes over many rows, in which each may have other sums than where it is decoded."""
    if isinstance(linear, FullLinear) and _is_bf16_on_cpu(linear.weight):
        return AlikeLinear(WidenedLinear(linear), _shape(linear))
    return linear


def packed_words(linear: Linear) -> Tensor | None:
    """The very memory of a packed linear layer, int32 `[blocks, in_features / 2, PACKED_BLOCK]`, where each word has
    two weights of one output; None where it is not laid out so."""
    if not isinstance(linear, AlikeLinear) or not isinstance(linear.product, PackedLinear):
        return None
    if not _is_packed_in_words(linear.shape):
        return None
    return _in_words(linear.product.memory(), linear.shape)


@lru_cache
def most_rows_apart() -> int:
    """Up to so many rows, each with a product of its own (`kernels.py`) are faster than one for all of them."""
    return 2 if _has_packed_linear() else 8


def _shape(full: FullLinear) -> tuple[int, int]:
    out_features, in_features = full.weight.shape
    return out_features, in_features


def _is_bf16_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.bfloat16


@lru_cache
def _has_packed_linear() -> bool:
    """Whether this CPU and this build of torch have oneDNN with bf16, which is checked against the plain product."""
    inputs, weight = _probe(16, 64, 32)
    try:
        outputs = PackedLinear.from_full(FullLinear(weight))(inputs)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(outputs.float(), functional.linear(inputs.float(), weight.float()), atol=0.5)


@lru_cache
def _is_packed_in_words(shape: tuple[int, int]) -> bool:
    out_features, in_features = shape
    if out_features % PACKED_BLOCK or in_features % 2:
        return False
    weight = _probe(1, out_features, in_features)[1]
    pairs = weight.view(torch.int32).view(-1, PACKED_BLOCK, in_features // 2)
    try:
        memory = PackedLinear.from_full(FullLinear(weight)).memory()
    except (AttributeError, RuntimeError):
        return False
    return len(memory) == weight.numel() and torch.equal(_in_words(memory, shape), pairs.transpose(1, 2))


def _in_words(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    return memory.view(torch.int32).view(shape[0] // PACKED_BLOCK, shape[1] // 2, PACKED_BLOCK)


@lru_cache
def _probed_rows(in_features: int) -> Tensor:
    return _probe(MAX_ALIKE_ROWS, 1, in_features)[0]


def _probe(num_rows: int, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Some bf16 inputs and a weight, always the same."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    return torch.randn(num_rows, in_features, generator=generator).bfloat16(), weight.bfloat16()
