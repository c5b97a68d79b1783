"""The weights of one layer as its program takes them: few tensors, most of which are several in one.

A layer's turn comes after others have gone through the caches, and what a tensor is, beside its numbers, has to come
from memory again: a layer in INT4 takes five to nine microseconds less with two inputs than with fourteen. Knows
matrices; knows no programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.linears.row_kernels import RowMatrix


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor; `is_apart` where its memory is somebody else's too, so that it cannot be joined with others."""

    dtype: torch.dtype
    shape: torch.Size
    is_apart: bool


@dataclass(frozen=True, slots=True)
class WeightPacking:
    """How the vectors and matrices of a layer lie in joined tensors: one for each dtype, then those that stay apart."""

    parts: tuple[_Part, ...]
    num_vectors: int
    matrix_sizes: tuple[int, ...]
    """Of how many tensors each matrix is."""

    @classmethod
    def of(cls, vectors: Sequence[Tensor], matrices: Sequence[RowMatrix]) -> "WeightPacking":
        parts = [_Part(vector.dtype, vector.shape, False) for vector in vectors]
        parts += [_Part(own.dtype, own.shape, matrix.is_shared) for matrix in matrices for own in matrix.tensors()]
        return cls(tuple(parts), len(vectors), tuple(len(matrix.tensors()) for matrix in matrices))

    def join(self, vectors: Sequence[Tensor], matrices: Sequence[RowMatrix]) -> list[Tensor]:
        """What a program is given, in memory of its own but for what stays apart."""
        tensors = [*vectors, *(own for matrix in matrices for own in matrix.tensors())]
        paired = list(zip(self.parts, tensors, strict=True))
        joined = [
            torch.cat([own.flatten() for part, own in paired if part.dtype is dtype and not part.is_apart])
            for dtype in self._joined_dtypes
        ]
        return joined + [own for part, own in paired if part.is_apart]

    def split(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...]]:
        """The vectors, and each matrix's tensors, as views of what `join` returned."""
        left = dict(zip(self._joined_dtypes, inputs, strict=False))
        apart = iter(inputs[len(left) :])
        tensors: list[Tensor] = []
        for part in self.parts:
            if part.is_apart:
                tensors.append(next(apart))
                continue
            size = part.shape.numel()
            tensors.append(left[part.dtype][:size].view(part.shape))
            left[part.dtype] = left[part.dtype][size:]
        matrices: list[tuple[Tensor, ...]] = []
        first = self.num_vectors
        for size in self.matrix_sizes:
            matrices.append(tuple(tensors[first : first + size]))
            first += size
        return tuple(tensors[: self.num_vectors]), tuple(matrices)

    @property
    def _joined_dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(part.dtype for part in self.parts if not part.is_apart))
