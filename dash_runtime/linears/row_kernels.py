"""Products of one row with a matrix in FULL, INT8 and INT4, from which Inductor makes loops at the speed of memory.

The eager kernels (`quantization.py`) serve many rows; these serve one, as part of a compiled layer. A matrix is laid
out in tiles of 16 outputs, as vectors with one word for each, so that a loop reads it from end to end. A rounded weight
is masked where it lies in its word and converted, without a shift. In FULL the matrix is read from the memory that
oneDNN packed for many rows, if the layout permits. All sums are float32. Knows matrices; knows no layers.
"""

from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from typing import ClassVar

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.linears.dense_linear import PACKED_BLOCK, Linear, packed_words
from dash_runtime.linears.quantization import INT4_GROUP_SIZE, quantize_int4, quantize_int8

TILE = 16
"""Outputs of one tile: the float32 lanes of an AVX-512 register."""
_NUM_SUMS = 4
"""Independent partial sums, so that an addition need not wait for the one before it."""
_INT4_BITS, _INT8_BITS = 4, 8
_FULL_UNROLL = 8
_PACKED_UNROLL = 4
_HIGH_HALF = -1 << 16
_MOST_ROWS_UNROLLED = 4
"""The most rows for which the sums of a whole block's outputs fit into the registers."""


@dataclass(frozen=True, slots=True)
class RowMatrix:
    """A matrix `[out_features, in_features]`, laid out for products with one row. Its fields are tensors."""

    is_shared: ClassVar[bool] = False
    """True if a product for many rows uses the same memory."""
    tile: ClassVar[int] = TILE
    """Outputs of one entry in the tensors' first dimension."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the inputs of a compiled program."""
        return tuple(getattr(self, own.name) for own in fields(self))

    def outputs_from(self, first: int) -> "RowMatrix":
        """Returns the part for the outputs from `first` on, a multiple of 16.

        A block-packed matrix may include up to 63 earlier outputs.
        """
        return replace(self, **{own.name: getattr(self, own.name)[first // self.tile :] for own in fields(self)})


@dataclass(frozen=True, slots=True)
class FullRowMatrix(RowMatrix):
    """A bf16 matrix, `[tiles, in_features / 8, 8, 16]`."""

    tiles: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "FullRowMatrix":
        out_features, in_features = weight.shape
        tiles = weight.view(out_features // TILE, TILE, in_features // _FULL_UNROLL, _FULL_UNROLL)
        return cls(tiles.permute(0, 2, 3, 1).contiguous())


@dataclass(frozen=True, slots=True)
class PackedRowMatrix(RowMatrix):
    """The memory of a `PackedLinear`, int32 `[blocks, in_features / 2, 64]` with two weights of an output in a word."""

    words: Tensor
    is_shared = True
    tile = PACKED_BLOCK


@dataclass(frozen=True, slots=True)
class Int8RowMatrix(RowMatrix):
    """An INT8 matrix, int32 `[tiles, in_features / 32, 8, 16]` with four weights in a word, the last one with a sign.

    Scales are `[out_features]`.
    """

    words: Tensor
    scales: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "Int8RowMatrix":
        quantized, scales = quantize_int8(weight)
        return cls(_pack_words(quantized.to(torch.int32) + 128, _INT8_BITS), scales)

    def outputs_from(self, first: int) -> "Int8RowMatrix":
        return Int8RowMatrix(self.words[first // TILE :], self.scales[first:])


@dataclass(frozen=True, slots=True)
class Int4RowMatrix(RowMatrix):
    """An INT4 matrix, int32 `[tiles, groups, 5, 16]`: eight weights in a word, and in a group's last word its scale and
    its zero, as the high and the low half.

    All in one place, since the processor fetches one stream ahead better than three.
    """

    words: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "Int4RowMatrix":
        quantized, scales, zeros = quantize_int4(weight)
        scale_bits, zero_bits = (_tile(own).to(torch.bfloat16).view(torch.int16).int() for own in (scales, zeros))
        grids = scale_bits << 16 | zero_bits & 0xFFFF
        return cls(torch.cat((_pack_words(quantized, _INT4_BITS), grids.unsqueeze(2)), dim=2))


_MATRICES: dict[Action, type[FullRowMatrix] | type[Int8RowMatrix] | type[Int4RowMatrix]] = {
    Action.FULL: FullRowMatrix,
    Action.INT8: Int8RowMatrix,
    Action.INT4: Int4RowMatrix,
}


def pack_row_matrix(action: Action, weight: Tensor, linear: Linear | None = None) -> RowMatrix:
    """Lays out `[out_features, in_features]` for `row_product`, or shares the memory of `linear` in FULL.

    `linear` is the same matrix for many rows. Its memory is used if one row is as fast with its layout.
    """
    words = packed_words(linear) if action is Action.FULL and linear is not None else None
    return _MATRICES[action].pack(weight) if words is None else PackedRowMatrix(words)


def as_row_matrix(action: Action, tensors: tuple[Tensor, ...]) -> RowMatrix:
    """Returns the matrix whose `tensors()` these are."""
    if action is Action.FULL and tensors[0].dtype is torch.int32:
        return PackedRowMatrix(*tensors)
    return _MATRICES[action](*tensors)


def is_packable(out_features: int, in_features: int) -> bool:
    """Returns True if these kernels can take a matrix of this shape."""
    return out_features % TILE == 0 and in_features % INT4_GROUP_SIZE == 0


def row_product(action: Action, inputs: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """Returns float32 `[rows, out_features]` from float32 `[rows, in_features]`. To be traced, not run eagerly."""
    if action is Action.FULL:
        return _full_product(inputs, tensors[0])
    return _int8_product(inputs, *tensors) if action is Action.INT8 else _int4_product(inputs, *tensors)


def full_products(inputs: Tensor, matrix: Tensor) -> Tensor:
    """Does `row_product` in FULL for a fixed number of rows, in one loop that reads the weights once.

    The sums are the same, bit for bit.
    """
    is_unrolled = inputs.shape[0] <= _MOST_ROWS_UNROLLED
    return torch.cat([_full_product(row, matrix, is_unrolled) for row in inputs.split(1)])


def _full_product(inputs: Tensor, matrix: Tensor, is_unrolled: bool = True) -> Tensor:
    if matrix.dtype is torch.int32:
        return _packed_product(inputs, matrix, TILE if is_unrolled else PACKED_BLOCK)
    shares = inputs.view(inputs.shape[0], 1, -1, _FULL_UNROLL, 1)
    products = [matrix[:, :, place].float() * shares[:, :, :, place] for place in range(_FULL_UNROLL)]
    return _add_up(products).sum(2).view(inputs.shape[0], -1)


def _packed_product(inputs: Tensor, words: Tensor, width: int) -> Tensor:
    """Makes a part of each block for every `width` outputs; the compiler joins a block's parts into one loop.

    Several parts read the block in the order of memory. A single part keeps fewer sums at a time.
    """
    shares = inputs.view(inputs.shape[0], 1, -1, _PACKED_UNROLL, 1)
    steps = words.unflatten(1, (-1, _PACKED_UNROLL // 2))
    sums: list[Tensor] = []
    for first in range(0, PACKED_BLOCK, width):
        products: list[Tensor] = []
        for place in range(_PACKED_UNROLL):
            word = steps[:, :, place // 2, first : first + width]
            bits = word & _HIGH_HALF if place % 2 else word << 16
            products.append(bits.view(torch.float32) * shares[:, :, :, place])
        sums.append(_add_up(products).sum(2))
    return torch.cat(sums, dim=-1).view(inputs.shape[0], -1)


def _int8_product(inputs: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    sums = _word_products(inputs, words, _INT8_BITS).sum(2).view(inputs.shape[0], -1)
    return scales.float() * (sums - _offset_sums(inputs, _INT8_BITS).sum((1, 2)))


def _int4_product(inputs: Tensor, words: Tensor) -> Tensor:
    # A weight is (value − 8) · scale + zero.
    sums = _word_products(inputs, words, _INT4_BITS) - _offset_sums(inputs, _INT4_BITS)
    input_sums = inputs.view(inputs.shape[0], 1, -1, INT4_GROUP_SIZE).sum(-1, keepdim=True)
    grids = words[:, :, -1]
    scales, zeros = (grids & _HIGH_HALF).view(torch.float32), (grids << 16).view(torch.float32)
    return (sums * scales + zeros * input_sums).sum(2).view(inputs.shape[0], -1)


def _word_products(inputs: Tensor, words: Tensor, num_bits: int) -> Tensor:
    """Returns each group's sum of its values times their inputs, `[rows, tiles, groups, 16]`.

    A value is masked where it lies in its word; the sums of each place are divided by the power of two that this
    multiplies them by.
    """
    num_places = 32 // num_bits
    num_words = INT4_GROUP_SIZE // num_places
    shares = inputs.view(inputs.shape[0], 1, -1, num_words, num_places, 1)
    total: Tensor | None = None
    for place in range(num_places):
        mask = _signed_word(((1 << num_bits) - 1) << num_bits * place)
        products = [(words[:, :, word] & mask).float() * shares[:, :, :, word, place] for word in range(num_words)]
        sums = reduce(add, products) * 2.0 ** -(num_bits * place)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def _offset_sums(inputs: Tensor, num_bits: int) -> Tensor:
    """Returns what each group's sum is too high by, `[rows, 1, groups, 1]`: half a range for every value but a word's
    last."""
    places = inputs.view(inputs.shape[0], 1, -1, INT4_GROUP_SIZE * num_bits // 32, 32 // num_bits)
    return 2.0 ** (num_bits - 1) * places[..., :-1].sum((-1, -2)).unsqueeze(-1)


def _signed_word(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def _add_up(terms: list[Tensor]) -> Tensor:
    sums = terms[:_NUM_SUMS]
    for place, term in enumerate(terms[_NUM_SUMS:]):
        sums[place % _NUM_SUMS] = sums[place % _NUM_SUMS] + term
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def _pack_words(values: Tensor, num_bits: int) -> Tensor:
    """Packs values `[out, in]` below 2^num_bits into int32 words, `[tiles, groups, words of a group, 16]`.

    A word's last value lies where the sign is: it is stored as a number with a sign, half a range lower.
    """
    out_features, in_features = values.shape
    num_places = 32 // num_bits
    shape = (out_features // TILE, TILE, in_features // INT4_GROUP_SIZE, -1, num_places)
    ordered = values.view(shape).permute(0, 2, 3, 1, 4)
    words = torch.zeros(ordered.shape[:-1], dtype=torch.int32)
    for place in range(num_places):
        offset = 1 << num_bits - 1 if place == num_places - 1 else 0
        words |= (ordered[..., place] - offset) << num_bits * place
    return words


def _tile(groups: Tensor) -> Tensor:
    """Puts `[out, groups]` in the order of the words, `[tiles, groups, 16]`."""
    return groups.view(-1, TILE, groups.shape[1]).transpose(1, 2).contiguous()
