"""The language-model head in each precision, with the final norm before it. Knows matrices; knows no layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.row_groups import group_rows, scatter_rows, take_rows
from dash_runtime.linears.dense_linear import Linear

Head = Callable[[Tensor], Tensor]
"""Maps the last layer's output `[rows, hidden_size]` to float32 logits `[rows, vocab_size]`."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads by precision."""

    by_precision: Mapping[Action, Head]

    def __call__(self, hidden: Tensor, precisions: Sequence[Action]) -> Tensor:
        """Returns float32 `[rows, vocab_size]` from the last layer's output, with each row's precision."""
        parts = [
            (rows, self.by_precision[precision](take_rows(hidden, rows))) for precision, rows in group_rows(precisions)
        ]
        return scatter_rows(parts, len(precisions))


def eager_head(linear: Linear, final_norm: RmsNorm, multiplier: float) -> Head:
    """Returns the head that runs `linear`; its logits are multiplied by `multiplier`."""
    if multiplier == 1:
        return lambda hidden: linear(final_norm(hidden)).float()
    return lambda hidden: linear(final_norm(hidden)).float() * multiplier
