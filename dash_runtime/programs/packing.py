"""Packs the weights of one layer for its program: most of its tensors are joined into a few.

Before a layer runs again, the other layers have gone through the CPU's caches, so each tensor's metadata has to come
from memory. A layer in INT4 takes five to nine microseconds less with two inputs than with fourteen. Knows matrices;
knows no programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dash_runtime.linears.row_kernels import RowMatrix


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor. `is_apart` is true if its memory is shared with another owner, so that it cannot be joined."""

    dtype: torch.dtype
    shape: torch.Size
    is_apart: bool


@dataclass(frozen=True, slots=True)
class WeightPacking:
    """The layout of a layer's vectors and matrices in joined tensors: one per dtype, then those that stay apart."""

    parts: tuple[_Part, ...]
    num_vectors: int
    matrix_sizes: tuple[int, ...]
    """The number of tensors of each matrix."""

    @classmethod
    def of(cls, vectors: Sequence[Tensor], matrices: Sequence[RowMatrix]) -> "WeightPacking":
        parts = [_Part(vector.dtype, vector.shape, False) for vector in vectors]
        parts += [_Part(own.dtype, own.shape, matrix.is_shared) for matrix in matrices for own in matrix.tensors()]
        return cls(tuple(parts), len(vectors), tuple(len(matrix.tensors()) for matrix in matrices))

    def join(self, vectors: Sequence[Tensor], matrices: Sequence[RowMatrix]) -> list[Tensor]:
        """Returns the inputs of a program: copies, except for the tensors that stay apart."""
        tensors = [*vectors, *(own for matrix in matrices for own in matrix.tensors())]
        paired = list(zip(self.parts, tensors, strict=True))
        joined = [
            torch.cat([own.flatten() for part, own in paired if part.dtype is dtype and not part.is_apart])
            for dtype in self._joined_dtypes
        ]
        return joined + [own for part, own in paired if part.is_apart]

    def split(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...]]:
        """Returns the vectors, and each matrix's tensors, as views of what `join` returned."""
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
        each = iter(tensors)
        vectors = tuple(islice(each, self.num_vectors))
        return vectors, tuple(tuple(islice(each, size)) for size in self.matrix_sizes)

    @property
    def _joined_dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(part.dtype for part in self.parts if not part.is_apart))
