"""The layouts in which native code reads a matrix, in FULL, INT8 and INT4: from end to end, at the speed of memory.

A matrix lies in tiles of 16 outputs, as vectors with one word for each, which has four INT8 weights or eight INT4 ones.
`products.h` has the products.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.int4_matrix import (
    INT4_GROUP_SIZE,
    INT4_OFFSET_BITS,
    INT4_SCALE_BITS,
    LANES,
    Int4Matrix,
    quantize_int4_with_rest,
)
from dash_runtime.linears.quantization import quantize_int8, through_int8

_INT4_BITS, _INT8_BITS = 4, 8
_MOST_PACKERS = 4
_LENGTH_ERROR = 1e-5
"""The error of a length in float32, as a share of it, at most."""
_BLOCKS = 64, 32, LANES
"""Outputs of a block of a matrix in FULL: four tiles are multiplied together, if they lie together."""
_TILES_TOGETHER = 128
"""A part of a matrix this large stays in the processor's cache while it is rounded and packed."""


@dataclass(frozen=True, slots=True)
class NativeMatrix:
    """A matrix `[out_features, in_features]`, laid out for products with a few rows. Its fields are tensors."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the words, and scales or units of the outputs if there are any."""
        return tuple(getattr(self, own.name) for own in fields(self))


@dataclass(frozen=True, slots=True)
class FullNativeMatrix(NativeMatrix):
    """A bf16 matrix, int32 `[blocks, in_features / 2, outputs of a block]` with two weights of an output in a word.
    A block is up to four tiles."""

    words: Tensor

    @classmethod
    def pack(cls, full: FullLinear) -> "FullNativeMatrix":
        out_features, in_features = full.weight.shape
        block = next(size for size in _BLOCKS if out_features % size == 0)
        pairs = full.weight.contiguous().view(torch.int32).view(out_features // block, block, in_features // 2)
        return cls(pairs.transpose(1, 2).contiguous())


@dataclass(frozen=True, slots=True)
class Int8NativeMatrix(NativeMatrix):
    """An INT8 matrix, int32 `[tiles, in_features / 32, 8, 16]` with four weights in a word, the last one with a sign.

    Scales are `[out_features]`.
    """

    words: Tensor
    scales: Tensor

    @classmethod
    def pack(cls, full: FullLinear) -> "Int8NativeMatrix":
        return cls.of(*quantize_int8(full.weight))

    @classmethod
    def of(cls, quantized: Tensor, scales: Tensor) -> "Int8NativeMatrix":
        """Packs int8 weights with their outputs' scales."""
        return cls(_pack_words(quantized.view(torch.uint8) ^ 128, _INT8_BITS), scales)


@dataclass(frozen=True, slots=True)
class Int8Outputs(NativeMatrix):
    """An INT8 matrix as it is, int8 `[out_features, in_features]`, for products of a few outputs alone.

    Scales are `[out_features]`.
    """

    weights: Tensor
    scales: Tensor

    @classmethod
    def pack(cls, full: FullLinear) -> "Int8Outputs":
        return cls(*quantize_int8(full.weight))


@dataclass(frozen=True, slots=True)
class Int8Errors(NativeMatrix):
    """The lengths of what INT8 changes of each output's weights, and of these, float32 `[out_features]`."""

    errors: Tensor
    lengths: Tensor

    @classmethod
    def pack(cls, full: FullLinear) -> "Int8Errors":
        weight = full.weight.float()
        changes = weight - through_int8(full.weight)
        return cls(*(own.norm(dim=1).mul_(1 + _LENGTH_ERROR) for own in (changes, weight)))


@dataclass(frozen=True, slots=True)
class Int4NativeMatrix(NativeMatrix):
    """An INT4 matrix, int32 `[tiles, lines, 16]`: for every two groups a line of their grids, and four lines each with
    eight weights in a word; the last group may be alone. A grid is half a word, the first group's the low one: seven
    bits of its scale, then nine of its offset, 256 higher.

    All in one place, since the processor fetches one stream ahead better than three. Units are `[out_features]`.
    """

    words: Tensor
    units: Tensor

    @classmethod
    def pack(cls, full: FullLinear) -> "Int4NativeMatrix":
        return cls._of(full.in_int4())

    @classmethod
    def pack_with_rest(cls, full: FullLinear, repeated: Tensor) -> "Int4NativeMatrix":
        """Packs a matrix that has some inputs again at its end (`quantize_int4_with_rest`)."""
        return cls._of(quantize_int4_with_rest(full.weight, repeated))

    @classmethod
    def _of(cls, matrix: Int4Matrix) -> "Int4NativeMatrix":
        words = _pack_words(matrix.values, _INT4_BITS)  # [tiles, groups, 4, 16]
        offsets = matrix.offsets.int() + 2 ** (INT4_OFFSET_BITS - 1)
        grids = _tile(matrix.scales.int() | offsets << INT4_SCALE_BITS)  # [tiles, groups, 16]
        if missing := grids.shape[1] % 2:
            words, grids = (functional.pad(own, (0, 0) * (own.ndim - 2) + (0, missing)) for own in (words, grids))
        lines = (grids[:, ::2] | grids[:, 1::2] << 16).unsqueeze(2)
        pairs = torch.cat((lines, words.unflatten(1, (-1, 2)).flatten(2, 3)), dim=2).flatten(1, 2)
        num_lines = pairs.shape[1] - missing * _INT4_BITS
        return cls(pairs[:, :num_lines].contiguous(), matrix.units)


_Packed = TypeVar("_Packed", bound=NativeMatrix)
_MATRICES: dict[Action, type[FullNativeMatrix] | type[Int8NativeMatrix] | type[Int4NativeMatrix]] = {
    Action.FULL: FullNativeMatrix,
    Action.INT8: Int8NativeMatrix,
    Action.INT4: Int4NativeMatrix,
}


_KINDS: dict[str, type[NativeMatrix]] = {
    **{action.name: kind for action, kind in _MATRICES.items()},
    "OUTPUTS": Int8Outputs,
    "ERRORS": Int8Errors,
}


def named_tensors(name: str, matrix: NativeMatrix) -> dict[str, Tensor]:
    """Returns the tensors of a matrix by names that tell its layout; `matrix_of` finds them again."""
    kind = next(key for key, own in _KINDS.items() if type(matrix) is own)
    return {f"{name}.{kind}.{own.name}": getattr(matrix, own.name) for own in fields(matrix)}


def matrix_of(name: str, tensors: Mapping[str, Tensor]) -> NativeMatrix | None:
    """Returns the matrix whose tensors were named so; None if there is none."""
    for key, kind in _KINDS.items():
        names = [f"{name}.{key}.{own.name}" for own in fields(kind)]
        if names[0] in tensors:
            return kind(*(tensors[own] for own in names))
    return None


def pack_native_matrix(action: Action, full: FullLinear) -> NativeMatrix:
    """Lays out the weights of `full` in one precision."""
    if action is Action.FULL:
        return FullNativeMatrix.pack(full)
    return _packed_in_parts(_MATRICES[action].pack, full)


def pack_rough_matrix(full: FullLinear, repeated: Tensor) -> NativeMatrix:
    """Lays out the weights of `full` in INT4, as `Int4NativeMatrix.pack_with_rest` does."""
    return _packed_in_parts(partial(Int4NativeMatrix.pack_with_rest, repeated=repeated), full)


def pack_outputs(full: FullLinear) -> Int8Outputs:
    """Rounds the weights of `full` to INT8, output by output."""
    return _packed_in_parts(Int8Outputs.pack, full)


def int8_errors(full: FullLinear) -> Int8Errors:
    """Returns how much INT8 changes each output's weights."""
    return _packed_in_parts(Int8Errors.pack, full)


def _packed_in_parts(pack: Callable[[FullLinear], _Packed], full: FullLinear) -> _Packed:
    # Each output is packed by itself. Threads that never wait for each other share a busy processor well.
    num_outputs = len(full.weight)
    num_together = LANES * min(-(-num_outputs // LANES // _num_packers()), _TILES_TOGETHER)
    starts = range(0, num_outputs, num_together)
    whole: list[Tensor] = []
    parts = _packers().map(pack, [full.outputs(start, start + num_together) for start in starts])
    for start, part in zip(starts, parts, strict=True):
        tensors = part.tensors()
        if not whole:
            whole = [
                own.new_empty((len(own) * num_outputs // min(num_together, num_outputs), *own.shape[1:]))
                for own in tensors
            ]
        for target, own in zip(whole, tensors, strict=True):
            first = start * len(target) // num_outputs
            target[first : first + len(own)] = own
    return type(part)(*whole)


@cache
def _num_packers() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux has it
    return min(_MOST_PACKERS, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


@cache
def _packers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_num_packers(), "packer", torch.set_num_threads, (1,))


def _pack_words(values: Tensor, num_bits: int) -> Tensor:
    """Packs uint8 values `[out, in]` below 2^num_bits into int32 words, `[tiles, groups, words of a group, 16]`.

    A word's last value lies where the sign is: it is stored as a number with a sign, half a range lower.
    """
    packed = values if num_bits == _INT8_BITS else values[:, ::2] | values[:, 1::2] << _INT4_BITS
    words = packed.contiguous().view(torch.int32)  # the first value in the lowest bits
    words = words.view(-1, LANES, values.shape[1] // INT4_GROUP_SIZE, num_bits)
    return words.permute(0, 2, 3, 1).contiguous().bitwise_xor_(torch.iinfo(torch.int32).min)


def _tile(groups: Tensor) -> Tensor:
    """Puts `[out, groups]` in the order of the words, `[tiles, groups, 16]`."""
    return groups.view(-1, LANES, groups.shape[1]).transpose(1, 2).contiguous()
