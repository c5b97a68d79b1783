"""The layouts in which native code reads a matrix, in each precision: from end to end, at the speed of memory.

A matrix lies in tiles of 16 outputs, as vectors with one word for each, which has four INT8 weights, eight INT4 ones,
or parts of INT3 ones. Layers in INT8 are their matrices in INT4 and four further bits of each weight. `products.h` has
the products.
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
from dash_runtime.linears.grouped_matrix import (
    FINER_STEPS,
    GROUP_SIZE,
    LANES,
    OFFSET_BITS,
    SCALE_BITS,
    GroupedMatrix,
    quantize_int4_with_rest,
    refine,
)
from dash_runtime.linears.quantization import grouped, quantize_int8, through_int8

_INT4_BITS, _INT8_BITS = 4, 8
_LINE_BYTES = 64
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
class Int4Outputs(NativeMatrix):
    """An INT4 matrix output by output, uint8 `[out_features, bytes]`, for products of a few outputs alone.

    An output has 16 bytes of each group, the first half of its weights in their low halves; behind them the groups'
    grids, each in two bytes, as `GroupedNativeMatrix` has them. It begins a cache line. Units are `[out_features]`.
    """

    words: Tensor
    units: Tensor

    @classmethod
    def pack_with_rest(cls, full: FullLinear, repeated: Tensor) -> "Int4Outputs":
        """Packs a matrix that has some inputs again at its end (`quantize_int4_with_rest`)."""
        matrix = quantize_int4_with_rest(full.weight, repeated)
        values = matrix.values.unflatten(1, (-1, 2, GROUP_SIZE // 2))
        own = (values[:, :, 0] | values[:, :, 1] << _INT4_BITS).flatten(1)
        # The product reads 16 grids at a time.
        grids = functional.pad(_grids(matrix).to(torch.int16), (0, -matrix.scales.shape[1] % LANES)).view(torch.uint8)
        missing = -(own.shape[1] + grids.shape[1]) % _LINE_BYTES
        return cls(functional.pad(torch.cat((own, grids), dim=1), (0, missing)), matrix.units)


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
class GroupedNativeMatrix(NativeMatrix):
    """A matrix in groups, int32 `[tiles, lines, 16]`: for every two groups a line of their grids, and as many lines
    each as a weight has bits; the last group may be alone. A grid is half a word, the first group's the low one: seven
    bits of its scale, then nine of its offset, 256 higher.

    All in one place, since the processor fetches one stream ahead better than three. Units are `[out_features]`.
    """

    words: Tensor
    units: Tensor


class Int4NativeMatrix(GroupedNativeMatrix):
    """An INT4 matrix. A line has eight weights in a word."""

    __slots__ = ()

    @classmethod
    def pack(cls, full: FullLinear) -> "Int4NativeMatrix":
        return cls.of(grouped(Action.INT4, full))

    @classmethod
    def pack_with_rest(cls, full: FullLinear, repeated: Tensor) -> "Int4NativeMatrix":
        """Packs a matrix that has some inputs again at its end (`quantize_int4_with_rest`)."""
        return cls.of(quantize_int4_with_rest(full.weight, repeated))

    @classmethod
    def of(cls, matrix: GroupedMatrix) -> "Int4NativeMatrix":
        """Packs a matrix that was rounded."""
        return cls(_in_lines(_pack_words(matrix.values, _INT4_BITS), matrix), matrix.units)


class Int3NativeMatrix(GroupedNativeMatrix):
    """An INT3 matrix. Two lines have the two lower bits of 16 weights in a word, and one the higher bits of all 32: in
    each byte those of every fourth weight, the first one's lowest."""

    __slots__ = ()

    @classmethod
    def pack(cls, full: FullLinear) -> "Int3NativeMatrix":
        matrix = grouped(Action.INT3, full)
        # As words of four weights, a byte each: [tiles, groups, 8, 16]
        fours = _pack_words(matrix.values, _INT8_BITS, has_sign=False).unflatten(2, (2, 4))
        low = _shifted_together(fours & 0x03030303, 2).flatten(2, 3)
        high = _shifted_together(fours.flatten(2, 3).unsqueeze(2) >> 2 & 0x01010101, 1).flatten(2, 3)
        return cls(_in_lines(torch.cat((low, high), dim=2), matrix), matrix.units)


@dataclass(frozen=True, slots=True)
class FurtherBits(NativeMatrix):
    """Four bits of each weight that a matrix in INT8 has beside INT4, int32 `[tiles, groups, 4, 16]` in the order of
    the words there; and units of its steps, `[out_features]`."""

    further: Tensor
    units: Tensor

    @classmethod
    def of(cls, full: FullLinear, coarse: GroupedMatrix) -> "FurtherBits":
        """Packs what the matrix in INT4 leaves of `full`."""
        further = refine(full.weight, coarse).further
        return cls(_pack_words(further, _INT4_BITS, has_sign=False), coarse.units / FINER_STEPS)


@dataclass(frozen=True, slots=True)
class _Int4AndFurther(NativeMatrix):
    """The tensors of both."""

    words: Tensor
    units: Tensor
    further: Tensor
    finer_units: Tensor

    @classmethod
    def pack(cls, full: FullLinear) -> "_Int4AndFurther":
        coarse = grouped(Action.INT4, full)
        return cls(*Int4NativeMatrix.of(coarse).tensors(), *FurtherBits.of(full, coarse).tensors())


@dataclass(frozen=True, slots=True)
class RefinedNativeMatrix(NativeMatrix):
    """A matrix in INT8 that shares the words of the one in INT4."""

    words: Tensor
    further: Tensor
    units: Tensor

    @classmethod
    def of(cls, coarse: NativeMatrix, bits: NativeMatrix) -> "RefinedNativeMatrix":
        """Puts them together."""
        return cls(coarse.tensors()[0], *bits.tensors())


_Packed = TypeVar("_Packed", bound=NativeMatrix)
_PACKERS: dict[Action, Callable[[FullLinear], NativeMatrix]] = {
    Action.INT8: Int8NativeMatrix.pack,
    Action.INT4: Int4NativeMatrix.pack,
    Action.INT3: Int3NativeMatrix.pack,
}


_KINDS: dict[str, type[NativeMatrix]] = {
    "FULL": FullNativeMatrix,
    "INT8": Int8NativeMatrix,
    "INT4": Int4NativeMatrix,
    "INT3": Int3NativeMatrix,
    "OUTPUTS": Int4Outputs,
    "ERRORS": Int8Errors,
    "FURTHER": FurtherBits,
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
    return _packed_in_parts(_PACKERS[action], full)


def pack_int4_and_further(full: FullLinear) -> tuple[Int4NativeMatrix, FurtherBits]:
    """Lays out the weights of `full` in INT4, and what INT8 has beside them."""
    words, units, further, finer_units = _packed_in_parts(_Int4AndFurther.pack, full).tensors()
    return Int4NativeMatrix(words, units), FurtherBits(further, finer_units)


def pack_rough_matrix(full: FullLinear, repeated: Tensor) -> NativeMatrix:
    """Lays out the weights of `full` in INT4, as `Int4NativeMatrix.pack_with_rest` does."""
    return _packed_in_parts(partial(Int4NativeMatrix.pack_with_rest, repeated=repeated), full)


def pack_outputs(full: FullLinear, repeated: Tensor) -> Int4Outputs:
    """Lays out the weights of `full` in INT4, output by output, as `Int4Outputs.pack_with_rest` does."""
    return _packed_in_parts(partial(Int4Outputs.pack_with_rest, repeated=repeated), full)


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


def _pack_words(values: Tensor, num_bits: int, has_sign: bool = True) -> Tensor:
    """Packs uint8 values `[out, in]` below 2^num_bits into int32 words, `[tiles, groups, words of a group, 16]`.

    A word's last value lies where the sign is: it is stored as a number with a sign, half a range lower, if wanted.
    """
    packed = values if num_bits == _INT8_BITS else values[:, ::2] | values[:, 1::2] << _INT4_BITS
    words = packed.contiguous().view(torch.int32)  # the first value in the lowest bits
    words = words.view(-1, LANES, values.shape[1] // GROUP_SIZE, num_bits)
    own = words.permute(0, 2, 3, 1).contiguous()
    return own.bitwise_xor_(torch.iinfo(torch.int32).min) if has_sign else own


def _shifted_together(words: Tensor, num_bits: int) -> Tensor:
    """Puts words `[…, n, 16]` into one, each `num_bits` higher than the one before: `[…, 1, 16]`."""
    shifts = num_bits * torch.arange(words.shape[-2], dtype=torch.int32).unsqueeze(-1)
    return (words << shifts).sum(dim=-2, keepdim=True, dtype=torch.int32)


def _in_lines(words: Tensor, matrix: GroupedMatrix) -> Tensor:
    """Puts a matrix's words, `[tiles, groups, words of a group, 16]`, beside its grids."""
    grids = _tile(_grids(matrix))  # [tiles, groups, 16]
    if missing := grids.shape[1] % 2:
        words, grids = (functional.pad(own, (0, 0) * (own.ndim - 2) + (0, missing)) for own in (words, grids))
    lines = (grids[:, ::2] | grids[:, 1::2] << 16).unsqueeze(2)
    pairs = torch.cat((lines, words.unflatten(1, (-1, 2)).flatten(2, 3)), dim=2).flatten(1, 2)
    return pairs[:, : pairs.shape[1] - missing * matrix.bits].contiguous()


def _grids(matrix: GroupedMatrix) -> Tensor:
    """Returns each group's grid in the lower half of a word, int32 `[out, groups]`."""
    return matrix.scales.int() | (matrix.offsets.int() + 2 ** (OFFSET_BITS - 1)) << SCALE_BITS


def _tile(groups: Tensor) -> Tensor:
    """Puts `[out, groups]` in the order of the words, `[tiles, groups, 16]`."""
    return groups.view(-1, LANES, groups.shape[1]).transpose(1, 2).contiguous()
