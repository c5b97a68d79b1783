"""Groups rows by action, and puts them back in order. Knows actions and tensors; knows no layers."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dash_runtime.devices import device_of

_Kernel = TypeVar("_Kernel", bound=int | tuple[int, ...])
"""An action, or an action with more that decides how a row runs."""
Groups = Sequence[tuple[_Kernel, list[int] | None]]


def group_rows(kernels: Sequence[_Kernel]) -> list[tuple[_Kernel, list[int] | None]]:
    """Returns the rows by kernel, in ascending order; None for the rows if one kernel has them all."""
    first = kernels[0]
    if all(kernel == first for kernel in kernels):
        return [(first, None)]
    return [(kernel, [row for row, own in enumerate(kernels) if own == kernel]) for kernel in sorted(set(kernels))]


def take_rows(tensor: Tensor, rows: Sequence[int] | None) -> Tensor:
    """Returns some rows of `[rows, …]`; all of them for None."""
    return tensor if rows is None else tensor[index_of(rows, tensor)]


def index_of(rows: Sequence[int], like: Tensor) -> Tensor:
    """Returns rows as an index for tensors on that device, without waiting for it."""
    return device_of(like.device).upload(torch.tensor(rows))


def scatter_rows(parts: list[tuple[list[int] | None, Tensor]], num_rows: int) -> Tensor:
    """Puts the groups' rows back in order."""
    if len(parts) == 1:
        return parts[0][1]
    whole = parts[0][1].new_empty((num_rows, *parts[0][1].shape[1:]))
    for rows, part in parts:
        assert rows is not None
        whole[index_of(rows, part)] = part
    return whole
