"""Products of one row with a matrix in FULL, INT8 and INT4, from which Inductor makes loops at the speed of memory.

The eager kernels (`quantization.py`) serve many rows; these serve one, as part of a compiled layer. A matrix is laid
out in tiles of 16 outputs, as vectors with one word for each, so that a loop reads it from end to end. Rounded weights
become bits of a float's mantissa, which takes a shift and a mask. In FULL the matrix is read from the memory that
oneDNN packed for many rows, if the layout permits. All sums are float32. Knows matrices; knows no layers.
"""

from dataclasses import dataclass, fields, replace
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
_ONE = 0x3F80_0000
"""The bits of 1.0. With the bits of a rounded weight put below, they make a number between 1 and 2."""
_MANTISSA_BITS = 23
_INT4_BITS, _INT8_BITS = 4, 8
_INT8_OFFSET = 128
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
    """An INT8 matrix, int32 `[tiles, in_features / 32, 8, 16]` with four weights plus 128 in a word.

    Scales are `[out_features]`.
    """

    words: Tensor
    scales: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "Int8RowMatrix":
        quantized, scales = quantize_int8(weight)
        return cls(_pack_words(quantized.to(torch.int32) + _INT8_OFFSET, _INT8_BITS), scales)

    def outputs_from(self, first: int) -> "Int8RowMatrix":
        return Int8RowMatrix(self.words[first // TILE :], self.scales[first:])


@dataclass(frozen=True, slots=True)
class Int4RowMatrix(RowMatrix):
    """An INT4 matrix, int32 `[tiles, groups, 4, 16]` with eight weights in a word.

    Scales and zeros are `[tiles, groups, 16]`.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> "Int4RowMatrix":
        quantized, scales, zeros = quantize_int4(weight)
        return cls(_pack_words(quantized, _INT4_BITS), _tile(scales), _tile(zeros))


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
    # A weight is (value − 128) · scale, while the sums are over value / 256 + 1.
    input_sums = inputs.sum(-1, keepdim=True)
    return scales.float() * (sums * 2.0**_INT8_BITS - input_sums * (2.0**_INT8_BITS + _INT8_OFFSET))


def _int4_product(inputs: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    sums = _word_products(inputs, words, _INT4_BITS) * 2.0**_INT4_BITS
    # A weight is (value − 8) · scale + zero, while the sums are over value + 16.
    offsets = zeros.float() - scales.float() * (8 + 2.0**_INT4_BITS)
    input_sums = inputs.view(inputs.shape[0], 1, -1, INT4_GROUP_SIZE).sum(-1, keepdim=True)
    return (sums * scales.float() + offsets * input_sums).sum(2).view(inputs.shape[0], -1)


def _word_products(inputs: Tensor, words: Tensor, num_bits: int) -> Tensor:
    """Returns each group's sum of `1 + value / 2^num_bits` times its input, `[rows, tiles, groups, 16]`."""
    values_of_word = 32 // num_bits
    shares = inputs.view(inputs.shape[0], 1, -1, INT4_GROUP_SIZE, 1)
    mask = ((1 << num_bits) - 1) << _MANTISSA_BITS - num_bits
    products: list[Tensor] = []
    for place in range(INT4_GROUP_SIZE):
        word = words[:, :, place // values_of_word]
        shift = _MANTISSA_BITS - num_bits * (place % values_of_word + 1)
        shifted = word << shift if shift >= 0 else word >> -shift
        products.append((shifted & mask | _ONE).view(torch.float32) * shares[:, :, :, place])
    return _add_up(products)


def _add_up(terms: list[Tensor]) -> Tensor:
    sums = terms[:_NUM_SUMS]
    for place, term in enumerate(terms[_NUM_SUMS:]):
        sums[place % _NUM_SUMS] = sums[place % _NUM_SUMS] + term
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def _pack_words(values: Tensor, num_bits: int) -> Tensor:
    """Packs values `[out, in]` below 2^num_bits into int32 words, `[tiles, groups, words of a group, 16]`."""
    out_features, in_features = values.shape
    values_of_word = 32 // num_bits
    shape = (out_features // TILE, TILE, in_features // INT4_GROUP_SIZE, -1, values_of_word)
    ordered = values.view(shape).permute(0, 2, 3, 1, 4)
    words = torch.zeros(ordered.shape[:-1], dtype=torch.int32)
    for place in range(values_of_word):
        words |= ordered[..., place] << num_bits * place
    return words


def _tile(groups: Tensor) -> Tensor:
    """Puts `[out, groups]` in the order of the words, `[tiles, groups, 16]`."""
    return groups.view(-1, TILE, groups.shape[1]).transpose(1, 2).contiguous()
