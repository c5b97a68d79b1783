"""Packing a layer's weights into few tensors loses nothing, and copies no shared memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.programs.packing import WeightPacking


@dataclass(frozen=True)
class Matrix:
    """A matrix of any tensors."""

    own: tuple[Tensor, ...]
    is_shared: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        return self.own

    def outputs_from(self, first: int) -> "Matrix":
        raise NotImplementedError


def numbers(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(torch.Size(size).numel()).view(size).to(dtype)


VECTORS = [numbers(8, dtype=torch.bfloat16), numbers(2, 4, dtype=torch.bfloat16)]
ROUNDED = Matrix((numbers(3, 2, 16, dtype=torch.int32), numbers(3, 16, dtype=torch.bfloat16)))
SHARED = Matrix((numbers(5, 7, dtype=torch.int32),), is_shared=True)


def test_what_is_split_is_what_was_joined() -> None:
    matrices = [ROUNDED, SHARED, ROUNDED]
    inputs = WeightPacking.of(VECTORS, matrices)
    joined = inputs.join(VECTORS, matrices)
    assert [tensor.dtype for tensor in joined] == [torch.bfloat16, torch.int32, torch.int32]
    vectors, parts = inputs.split(joined)
    for own, expected in zip(vectors, VECTORS, strict=True):
        assert torch.equal(own, expected)
    for matrix, own_parts in zip(matrices, parts, strict=True):
        assert all(map(torch.equal, own_parts, matrix.tensors()))


def test_shared_memory_is_passed_on_and_all_else_lies_in_one_piece_for_each_dtype() -> None:
    inputs = WeightPacking.of(VECTORS, [SHARED, ROUNDED])
    joined = inputs.join(VECTORS, [SHARED, ROUNDED])
    assert joined[-1] is SHARED.own[0]
    assert [tensor.numel() for tensor in joined[:2]] == [16 + 48, 96]
    _, (shared, rounded) = inputs.split(joined)
    assert shared[0] is SHARED.own[0]
    assert rounded[0].untyped_storage().data_ptr() == joined[1].untyped_storage().data_ptr()


def test_another_layers_weights_are_joined_alike() -> None:
    inputs = WeightPacking.of(VECTORS, [ROUNDED])
    other = Matrix(tuple(tensor + 1 for tensor in ROUNDED.own))
    _, (own,) = inputs.split(inputs.join(VECTORS, [other]))
    assert all(map(torch.equal, own, other.own))
