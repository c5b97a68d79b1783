"""Groups rows by action, and puts them back in order. Knows actions and tensors; knows no layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_runtime.actions import Action

Groups = Sequence[tuple[Action, list[int] | None]]


def group_rows(actions: Sequence[Action]) -> list[tuple[Action, list[int] | None]]:
    """Returns the rows by action, in ascending order of action; None for the rows if one action has them all."""
    first = actions[0]
    if all(action is first for action in actions):
        return [(first, None)]
    return [(action, [row for row, own in enumerate(actions) if own is action]) for action in sorted(set(actions))]


def scatter_rows(parts: list[tuple[list[int] | None, Tensor]], num_rows: int) -> Tensor:
    """Puts the groups' rows back in order."""
    if len(parts) == 1:
        return parts[0][1]
    whole = parts[0][1].new_empty((num_rows, *parts[0][1].shape[1:]))
    for rows, part in parts:
        whole[torch.tensor(rows, device=part.device)] = part
    return whole
