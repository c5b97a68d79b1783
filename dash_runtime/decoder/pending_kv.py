"""What one layer projects in one pass: the rows that run it, and rows of now and before that skipped it.

The keys and values of a skipped row are projected late: together with those of the next row of its sequence that runs
the layer, in one product that costs little more than that row's alone, or once `MAX_PENDING` of them wait. Nothing
attends to them before. Knows actions and tensors; knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.kv_cache import SequenceCache

MAX_PENDING = 8
"""So many skipped rows of one sequence and layer are projected without waiting for a row that runs: few enough to be
cheap beside that row, many enough to be cheap alone."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive positions of one sequence whose keys and values are projected: from `start` on, in the projection's
    rows from `first_row` on."""

    cache: SequenceCache
    start: int
    num_rows: int
    first_row: int


@dataclass(frozen=True, slots=True)
class Projection:
    """What one layer projects in one pass: rows that run, and rows of now and before that were skipped."""

    hidden: Tensor
    """`[projected rows, hidden_size]`, the layer's inputs."""
    actions: Sequence[Action]
    """Each row's; SKIP where only keys and values are wanted. A skipped row takes that of the row that it went with."""
    cosines: Tensor
    sines: Tensor
    stretches: Sequence[Stretch]
    own_rows: slice | Tensor | None
    """Where the pass's own rows are among the projected ones (a row that skips has no place, and gets any); None: they
    are the same."""


def group_rows(actions: Sequence[Action]) -> list[tuple[Action, list[int] | None]]:
    """The rows by action, in ascending order of action; None where one action has all rows."""
    first = actions[0]
    if all(action is first for action in actions):
        return [(first, None)]
    return [(action, [row for row, own in enumerate(actions) if own is action]) for action in sorted(set(actions))]


def late_actions(num_pending: int, actions: Sequence[Action]) -> list[Action]:
    """With which action each row of one sequence is projected, the pending ones first; the rows left over wait."""
    projected: list[Action] = []
    num_waiting = num_pending
    for action in actions:
        num_waiting += 1
        if action is not Action.SKIP or num_waiting == MAX_PENDING:
            projected += [action] * num_waiting
            num_waiting = 0
    return projected
