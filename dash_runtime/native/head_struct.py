"""Matrices and heads as the structures of the native code. Knows memory; knows no layers."""

from collections.abc import Sequence
from ctypes import Array, c_int64
from typing import NamedTuple

from torch import Tensor

from dash_runtime.linears.grouped_matrix import LANES
from dash_runtime.native.matrix import (
    FullNativeMatrix,
    Int3NativeMatrix,
    Int4NativeMatrix,
    Int4Outputs,
    Int8NativeMatrix,
    NativeMatrix,
    RefinedNativeMatrix,
)
from dash_runtime.native.structs import MOST_EXACT_TILES, HeadStruct, MatrixStruct, TokenRowsStruct

_LAYOUTS: dict[type[NativeMatrix], int] = {
    FullNativeMatrix: 0,
    Int8NativeMatrix: 1,
    Int4NativeMatrix: 2,
    Int3NativeMatrix: 3,
    RefinedNativeMatrix: 4,
}


class RoughMatrix(NamedTuple):
    """A cheap matrix for all logits of a head: its exact one computes those of `num_exact` tiles of a row again."""

    matrix: NativeMatrix
    repeated: Tensor
    """The inputs that the matrix has again at its end, int64."""
    num_exact: int


class HeadBounds(NamedTuple):
    """The bounds of a matrix's rough logits: how far they may be off its own, so that each row's likeliest token is
    found without most of these."""

    rough: NativeMatrix
    errors: Tensor
    """The lengths of what the rough matrix's rows are off by, float32 `[vocab_size]`."""
    lengths: Tensor
    """The lengths of the matrix's rows, likewise."""


class NarrowHead(NamedTuple):
    """A head of narrow states (`layers/narrow_head.py`)."""

    exact: NativeMatrix
    """The head's matrix."""
    narrow: NativeMatrix
    rough: NativeMatrix
    rank: int
    mean: Tensor
    """Float32 `[hidden_size]`."""
    offsets: Tensor
    """Float32 `[vocab_size]`."""
    rows: Int4Outputs
    """The head's matrix in INT4."""
    repeated: Tensor
    """The inputs that `rows` have again at their end, int64."""
    num_exact: int
    """Tiles that `exact` computes again."""


def head_struct(
    head: NativeMatrix | NarrowHead,
    norm: Tensor,
    vocab_size: int,
    multiplier: float,
    more: RoughMatrix | HeadBounds | None,
) -> tuple[HeadStruct, list[object]]:
    """Returns a final norm and a head for the native code, with what its matrix has beside it, and the owners of their
    memory."""
    own, num_tiles = norm.float().contiguous(), vocab_size // LANES
    struct = HeadStruct(norm=own.data_ptr(), num_tiles=num_tiles, multiplier=multiplier)
    owners: list[object] = [own]
    if isinstance(head, NarrowHead):
        struct.matrix, exact = packed_struct(head.exact, len(norm))
        struct.narrow, narrow = packed_struct(head.narrow, len(norm))
        struct.rough, wide = packed_struct(head.rough, head.rank)
        tensors = [head.mean.contiguous(), head.offsets.contiguous(), head.rows.words, head.rows.units]
        struct.mean, struct.offsets, *rows = (tensor.data_ptr() for tensor in tensors)
        struct.rows = TokenRowsStruct(*rows, len(norm) + len(head.repeated))
        _tell_exact(struct, head.repeated, head.num_exact, num_tiles)
        owners += [exact, narrow, wide, tensors]
        return struct, owners
    struct.matrix, kept = packed_struct(head, len(norm))
    owners.append(kept)
    match more:
        case RoughMatrix(rough, repeated, num_exact):
            struct.rough, kept = packed_struct(rough, len(norm) + len(repeated))
            _tell_exact(struct, repeated, num_exact, num_tiles)
            owners.append(kept)
        case HeadBounds(rough, errors, lengths):
            struct.bounds.rough, kept = packed_struct(rough, len(norm))
            struct.bounds.errors, struct.bounds.lengths = errors.data_ptr(), lengths.data_ptr()
            owners += [kept, errors, lengths]
    return struct, owners


def _tell_exact(struct: HeadStruct, repeated: Tensor, num_exact: int, num_tiles: int) -> None:
    struct.num_exact = min(num_exact, MOST_EXACT_TILES, num_tiles)
    struct.repeated = numbers_struct(repeated.tolist())


def packed_struct(matrix: NativeMatrix, num_inputs: int) -> tuple[MatrixStruct, list[Tensor]]:
    """Returns a matrix for the native code, and the tensors whose memory it is."""
    words, *others = matrix.tensors()
    further = [others.pop(0)] if isinstance(matrix, RefinedNativeMatrix) else []
    scales = [own.float().contiguous() for own in others]
    kept = [words, *further, *scales]
    addresses = [own[0].data_ptr() if own else None for own in ([words], further, scales)]
    block_tiles = words.shape[-1] // LANES
    sizes = num_inputs, block_tiles, len(words) * block_tiles
    return MatrixStruct(*addresses, _LAYOUTS[type(matrix)], *sizes), kept


def numbers_struct(numbers: Sequence[int]) -> "Array[c_int64]":
    """Returns numbers for the native code."""
    return (c_int64 * len(numbers))(*numbers)
