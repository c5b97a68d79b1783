"""Keys and values that one sequence still has to project: the inputs of the layers that it skipped.

A skipped row's keys and values are projected late, before anything attends to them. Either the sequence's next row that
runs the layer takes them along, in one product that costs little more than that row's alone. Or `MAX_PENDING` rows
wait, and are projected together. Knows tensors; knows no positions and no weights.
"""

from collections.abc import Sequence

from torch import Tensor

from dash_runtime.actions import Action

MAX_PENDING = 8
"""The number of waiting rows of one sequence and layer that are projected without a row that runs: few enough to be
cheap beside such a row, many enough to be cheap alone."""


class PendingKv(list[list[Tensor]]):
    """Each layer's inputs `[1, hidden_size]` of the latest positions that skipped it, oldest first.

    Readers must not change the lists; only the methods do.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__([] for _ in range(num_layers))

    def add(self, layer: int, row: Tensor) -> int:
        """Lets one more row wait; returns the number of waiting rows."""
        self[layer].append(row)
        return len(self[layer])

    def take(self, layer: int) -> list[Tensor]:
        """Removes and returns the waiting rows."""
        rows, self[layer] = self[layer], []
        return rows

    def take_with(
        self, layer: int, rows: Sequence[Tensor], actions: Sequence[Action]
    ) -> tuple[list[Tensor], list[Action]]:
        """Adds further rows, one per action. Removes and returns the rows to project now, and each one's action.

        A row that runs takes all rows before it along, and so does the last of `MAX_PENDING`. The others wait.
        """
        together = [*self[layer], *rows]
        projected: list[Action] = []
        for end, action in enumerate(actions, len(self[layer]) + 1):
            num_waiting = end - len(projected)
            if action is not Action.SKIP or num_waiting == MAX_PENDING:
                projected += [action] * num_waiting
        self[layer] = together[len(projected) :]
        return together[: len(projected)], projected

    def forget(self, num_positions: int) -> None:
        """Drops the latest positions."""
        for layer, rows in enumerate(self):
            self[layer] = rows[: max(0, len(rows) - num_positions)]
