"""Linear layers with the weights as loaded, with the CPU's fastest products for one row and for many.

Knows matrices; knows no layers.
"""

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.devices import device_of
from dash_runtime.linears.grouped_matrix import GroupedMatrix
from dash_runtime.linears.kept_trials import NO_TRIALS, KeptTrials

MAX_INVARIANT_ROWS = 256
"""A row of a `BatchInvariantLinear` has the same bits in every pass of up to this many rows."""
_PACKED_BLOCKS = 64, 32
"""Outputs in a block of oneDNN's layout for CPUs that multiply bf16; 32 with torch 2.15 where there are matrix tiles
(AMX). A word has an output's weights of two inputs."""
_TRIED_BLOCK = 64
"""Different outputs that a trial has."""
_PACKED_ROWS = 16
"""The number of rows that oneDNN packs for. From 2 on it makes no difference. Packed for 1, torch 2.15 takes time in
proportion to the rows, and rounds a lone row differently from two."""
_USUAL_ROWS = 64
_TRIED_COUNTS = (*range(1, 33), *range(48, MAX_INVARIANT_ROWS + 1, 16))
_TRIED_OUTPUTS = 1 << 15
"""The approximate number of outputs tried of a larger matrix, since packing it takes seconds and a gigabyte."""
_CALL_ROWS = 16
"""The fixed time of a product, counted in rows that take as long."""
_NUM_CHECKED = 3
_UNPACKED_OUTPUTS = 1 << 10
"""Outputs that are unpacked at a time. More would not stay in a near cache, and their memory would be requested from
the system every time."""

Linear = Callable[[Tensor], Tensor]
"""Maps `[rows, in_features]` to `[rows, out_features]`, bias included."""


@dataclass(frozen=True, slots=True)
class FullLinear:
    """The weights as loaded. `weight` is `[out_features, in_features]`."""

    weight: Tensor
    bias: Tensor | None = None
    keys_from: int | None = None
    """The first of the outputs that are keys and values, up to the last; None if there are none."""
    finer_keys: Action | None = None
    """The precision of keys and values where the other outputs are in INT4 or INT3; None: INT4."""
    rounded: Mapping[Action, GroupedMatrix] = field(default_factory=dict)
    """The matrix in actions for which it was rounded with its inputs in view; others round each weight to the
    nearest."""

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight, self.bias)

    def outputs(self, first: int, last: int | None = None) -> "FullLinear":
        """Returns some of its outputs."""
        bias, keys_from = self.bias, self.keys_from
        if keys_from is not None:
            keys_from = max(0, keys_from - first) if last is None or keys_from < last else None
        rounded = {action: matrix.outputs(first, last) for action, matrix in self.rounded.items()}
        own_bias = None if bias is None else bias[first:last]
        return FullLinear(self.weight[first:last], own_bias, keys_from, self.finer_keys, rounded)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The bf16 weights in oneDNN's blocked layout, which it would otherwise make anew for every product."""

    packed: Tensor
    bias: Tensor | None

    @classmethod
    def from_full(cls, full: FullLinear) -> "PackedLinear":
        return cls(torch.ops.mkldnn._reorder_linear_weight(full.weight, _PACKED_ROWS), full.bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")

    def memory(self) -> Tensor:
        """Returns the packed weights, flat, in their own memory and order.

        Raises AttributeError or RuntimeError if this build of torch does not tell its address.
        """
        address, size = torch.ops.mkldnn.data_ptr(self.packed), torch.ops.mkldnn._nbytes(self.packed)
        memory: Any = (ctypes.c_ubyte * size).from_address(address)
        memory.owner = self.packed  # a tensor keeps its buffer alive, and so the weights
        return torch.frombuffer(memory, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class WidenedLinear:
    """The bf16 weights, widened to float32 for every product.

    On a CPU that multiplies no bf16, every row of PyTorch's own product takes as long as the first. Widening takes
    about as long as one row, and each row then costs a fifth to a tenth.
    """

    full: FullLinear

    def __call__(self, inputs: Tensor) -> Tensor:
        wide = inputs.float()
        sums = unpacked_product(wide, Tensor.float, self.full.weight)
        return (sums if self.full.bias is None else sums + self.full.bias.float()).to(inputs.dtype)


def unpacked_product(inputs: Tensor, unpack: Callable[..., Tensor], *stored: Tensor) -> Tensor:
    """Returns `[rows, out_features]`: the dense product with a matrix that is stored in another form.

    Args:
        unpack: maps the same outputs of all `stored` tensors to their part of the matrix, in the dtype of `inputs`.
        stored: tensors with a row for each output.
    """
    each = zip(*(own.split(_UNPACKED_OUTPUTS) for own in stored), strict=True)
    parts = [functional.linear(inputs, unpack(*part)) for part in each]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class BatchInvariantLinear:
    """A product in which a row's bits never depend on its neighbours, up to `MAX_INVARIANT_ROWS` rows in all.

    The library's order of addition depends on the number of rows: mostly a lone row differs, and every number at which
    a long sum is split between threads. When the layer is made, it tries which numbers agree for its shape. All others
    are padded to one that agrees, or split into several.

    Args:
        make_product: packs the matrix for the library's product.
        full: the matrix.
        trials: what keeps which numbers agree: to try them takes half a second and a hundred megabytes of kernels.
    """

    def __init__(
        self, make_product: Callable[[FullLinear], Linear], full: FullLinear, trials: KeptTrials = NO_TRIALS
    ) -> None:
        self.product, self.trials = make_product(full), trials
        self.shape = (full.weight.shape[0], full.weight.shape[1])
        self._first_parts = partial(_tried_first_parts, trials, make_product, self.shape, full.bias is not None)
        self._first_parts(torch.get_num_threads())

    def __call__(self, inputs: Tensor) -> Tensor:
        num_rows = len(inputs)
        if num_rows > MAX_INVARIANT_ROWS:
            return self.product(inputs)
        first = self._first_parts(torch.get_num_threads())[num_rows]
        if first == num_rows:
            return self.product(inputs)
        if first > num_rows:
            return self.product(functional.pad(inputs, (0, 0, 0, first - num_rows)))[:num_rows]
        return torch.cat([self.product(inputs[:first]), self(inputs[first:])])


def first_parts(counts: Collection[int]) -> Sequence[int]:
    """Splits every number of rows up to `MAX_INVARIANT_ROWS` into the cheapest calls of `counts` rows.

    Returns, by number of rows, the size of the first call. It exceeds the number of rows if the call is padded.
    """
    seconds, first = [0.0], [0]
    for num_rows in range(1, MAX_INVARIANT_ROWS + 1):
        ways = ((_CALL_ROWS + count + seconds[max(0, num_rows - count)], count) for count in counts)
        shortest, part = min(ways)
        seconds.append(shortest)
        first.append(part)
    return first


@cache
def _tried_first_parts(
    trials: KeptTrials,
    make_product: Callable[[FullLinear], Linear],
    shape: tuple[int, int],
    has_bias: bool,
    num_threads: int,
) -> Sequence[int]:
    """Returns `first_parts` of the numbers of rows at which every row has the same bits as among the usual number.

    Each sum's terms cancel in pairs, so only rounding errors are left, and these differ wherever the order differs.
    Other sums would mostly round to the same bf16.
    """
    out_features, in_features = shape
    num_outputs = min(out_features, _TRIED_OUTPUTS + out_features % _TRIED_BLOCK)
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(_TRIED_BLOCK, in_features // 2, generator=generator)
    shares = torch.randn(in_features // 2, generator=generator)
    order = torch.randperm(in_features // 2, generator=generator)
    rest = torch.zeros(_TRIED_BLOCK, in_features % 2)
    some = torch.cat((half, half[:, order], rest), dim=1).bfloat16()
    weight = some.repeat(-(-num_outputs // _TRIED_BLOCK), 1)[:num_outputs]
    row = torch.cat((shares, -shares[order], rest[0])).bfloat16()
    bias = torch.zeros(num_outputs, dtype=torch.bfloat16) if has_bias else None
    product = make_product(FullLinear(weight, bias))
    rows = row.expand(MAX_INVARIANT_ROWS, -1).contiguous()
    usual = product(rows[:_USUAL_ROWS])[0]

    def agrees(count: int) -> bool:
        return bool((product(rows[:count]) == usual).all())

    key = None if (name := _NAMES.get(make_product)) is None else (name, shape, has_bias, num_threads)
    agreeing = None if key is None else trials.read(key)
    if not agreeing or not set(agreeing) <= set(_TRIED_COUNTS) or not all(map(agrees, agreeing[:_NUM_CHECKED])):
        agreeing = [count for count in _TRIED_COUNTS if agrees(count)]
        if key is not None:
            trials.keep(key, agreeing)
    return first_parts(agreeing if _USUAL_ROWS in agreeing else (1,))


def make_full_linear(full: FullLinear, trials: KeptTrials = NO_TRIALS) -> Linear:
    """Returns the fastest product for few rows. A packed one is also the fastest for many."""
    full = replace(full, rounded={})  # so that nothing keeps what other products have packed
    if not device_of(full.weight.device).has_packed_products or full.weight.dtype is not torch.bfloat16:
        return full
    return BatchInvariantLinear(PackedLinear.from_full if _has_packed_linear() else _as_loaded, full, trials)


def for_many_rows(linear: Linear) -> Linear:
    """Returns the same matrix for passes over many rows. A row's sums may differ from those in decoding."""
    if isinstance(linear, BatchInvariantLinear) and isinstance(linear.product, FullLinear):
        return BatchInvariantLinear(WidenedLinear, linear.product, linear.trials)
    return linear


def _as_loaded(full: FullLinear) -> FullLinear:
    return full


_NAMES: dict[Callable[[FullLinear], Linear], str] = {
    PackedLinear.from_full: "packed",
    WidenedLinear: "widened",
    _as_loaded: "as loaded",
}
"""Products whose trials are kept."""


def packed_words(linear: Linear) -> Tensor | None:
    """Returns a packed linear layer's own memory, int32 `[blocks, in_features / 2, outputs of a block]`, or None.

    Each word has two weights of one output. None means that the layer has another layout.
    """
    if not isinstance(linear, BatchInvariantLinear) or not isinstance(linear.product, PackedLinear):
        return None
    block = _packed_block(linear.shape)
    return None if block is None else _in_words(linear.product.memory(), linear.shape, block)


@lru_cache
def _has_packed_linear() -> bool:
    """Returns True if this CPU and build of torch have oneDNN with bf16; checks it against the plain product."""
    inputs, weight = _probe(16, 64, 32)
    try:
        outputs = PackedLinear.from_full(FullLinear(weight))(inputs)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(outputs.float(), functional.linear(inputs.float(), weight.float()), atol=0.5)


@lru_cache
def _packed_block(shape: tuple[int, int]) -> int | None:
    """Returns the outputs of a block of such a matrix that oneDNN packed; None if it has another layout."""
    out_features, in_features = shape
    if in_features % 2:
        return None
    weight = _probe(1, out_features, in_features)[1]
    pairs = weight.view(torch.int32)
    try:
        memory = PackedLinear.from_full(FullLinear(weight)).memory()
    except (AttributeError, RuntimeError):
        return None
    if len(memory) != weight.numel():
        return None

    def has_blocks_of(size: int) -> bool:
        blocks = pairs.view(-1, size, in_features // 2).transpose(1, 2)
        return torch.equal(_in_words(memory, shape, size), blocks)

    return next((size for size in _PACKED_BLOCKS if out_features % size == 0 and has_blocks_of(size)), None)


def _in_words(memory: Tensor, shape: tuple[int, int], block: int) -> Tensor:
    return memory.view(torch.int32).view(shape[0] // block, shape[1] // 2, block)


def _probe(num_rows: int, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Returns some bf16 inputs and a weight, always the same."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    return torch.randn(num_rows, in_features, generator=generator).bfloat16(), weight.bfloat16()
