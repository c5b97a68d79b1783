"""The interface of a backend. Knows batches; knows no models."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.batch import Batch
from dash_runtime.passes import Limit, PassPlan, PassResult


class Backend(Protocol):
    """Runs a decoder's passes of some kinds."""

    @property
    def graphs(self) -> "Graphs | None":
        """Its graphs, if it has any."""

    def takes(self, batch: Batch) -> bool:
        """Returns True if it can run this pass."""

    def run(
        self, plan: PassPlan, token_ids: Sequence[int], batch: Batch, limit: Limit | None = None
    ) -> PassResult | None:
        """Runs a pass over these tokens, one per row: embedding, layers and head.

        Args:
            limit: decode several tokens of a lone row, one pass after another. The batch stays where it is.

        Returns None only for a limit that it cannot go to: then the caller decodes token by token.
        """

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        """Runs one layer with each row's own action, `[rows, hidden_size]` to the same.

        Every row's keys and values are written before a row attends to them; a skipped row's come from the layer's
        input (the KV rule). `hidden` and the returned tensor are not written to before the next pass, since a policy
        may still be reading them.
        """

    def logits(self, hidden: Tensor, precisions: Sequence[Action]) -> Tensor:
        """Returns float32 `[rows, vocab_size]` from the last layer's output, with each row's head precision."""


class Graphs(Protocol):
    """Graphs that a backend's passes replay."""

    may_capture: bool
    """False while requests are served, who would wait for it: then what has no graph is launched kernel by kernel."""

    def graph_sizes(self, max_rows: int) -> Sequence[int]:
        """Returns the numbers of rows that passes of up to `max_rows` are filled up to."""

    def context_sizes(self, longest: int) -> Sequence[int]:
        """Returns the numbers of positions that have graphs of their own, for rows of up to `longest`, ascending."""

    def prepare(self, batch: Batch, layer: int, context: int) -> None:
        """Captures a layer's graphs for passes like this one with rows of up to `context` positions, in every action
        and with the first row's compensation; and those that all layers share.

        The rows' next positions are written to, but not counted.

        Raises:
            CaptureFailed: the device cannot.
        """

    def static_input(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Returns where the layer's input lies in every pass of so many rows, `[rows or more, hidden_size]`.

        None if `hidden` is not what this backend gave for the layer.
        """
