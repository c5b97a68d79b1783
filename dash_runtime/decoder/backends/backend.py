"""The interface of a backend. Knows batches; knows no models."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.rows.burst import Burst, WantedBurst
from dash_runtime.rows.draws import DrawTokens


class Backend(Protocol):
    """Runs a decoder's layers and head for passes of some kinds."""

    def takes(self, batch: Batch) -> bool:
        """Returns True if it can run this pass."""

    @property
    def decides_in_pass(self) -> bool:
        """True if `run_pass` also evaluates policies."""

    def start_pass(self, token_ids: Sequence[int], batch: Batch) -> Tensor | None:
        """Begins a pass and returns layer 0's input, `[rows, hidden_size]`; None if the caller has to make it."""

    def static_input(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Returns where the layer's input lies in every pass of so many rows, `[rows or more, hidden_size]`.

        None if each pass has memory of its own, or `hidden` is not what this backend gave for the layer.
        """

    def graph_sizes(self, max_rows: int) -> Sequence[int]:
        """Returns the numbers of rows that passes of up to `max_rows` are filled up to; none without graphs."""

    def prepare(self, batch: Batch) -> None:
        """Captures the graphs of passes like this one, with its first row's compensation.

        The rows' next positions are written to, but not counted.

        Raises:
            CaptureFailed: the device cannot.
        """

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        """Runs one layer with each row's own action, `[rows, hidden_size]` to the same.

        Every row's keys and values are written before a row attends to them; a skipped row's come from the layer's
        input (the KV rule). `hidden` and the returned tensor are not written to before the next pass, since a policy
        may still be reading them.
        """

    def run_layers(self, action: Action, hidden: Tensor, batch: Batch) -> Tensor | None:
        """Runs all layers at once with one action, with the same numbers; returns None if it cannot."""

    def run_pass(self, plan: PassPlan, token_ids: Sequence[int], batch: Batch) -> PassRun | None:
        """Runs a pass at once, with the same numbers: embedding, layers and head; returns None if it cannot.

        It is quicker with the plan and the batch of the pass before.
        """

    def run_burst(
        self, plan: PassPlan, wanted: WantedBurst, batch: Batch, guessed: PassPlan | None = None
    ) -> Burst | None:
        """Decodes several tokens at once, with the same numbers; returns None if it cannot.

        The batch stays where it is. Passes with guesses run the plan `guessed`, which decides nothing.
        """

    @property
    def draw(self) -> DrawTokens | None:
        """The function that draws tokens from its passes' logits; None if it has none that is faster than numpy."""

    def logits(self, hidden: Tensor, precisions: Sequence[Action]) -> Tensor:
        """Returns float32 `[rows, vocab_size]` from the last layer's output, with each row's head precision."""


class OwnMemory:
    """The answers of a backend whose passes each have memory of their own."""

    def start_pass(self, token_ids: Sequence[int], batch: Batch) -> Tensor | None:
        return None

    def static_input(self, layer: int, hidden: Tensor) -> Tensor | None:
        return None

    def graph_sizes(self, max_rows: int) -> Sequence[int]:
        return ()

    def prepare(self, batch: Batch) -> None:
        pass


class LayerByLayer(OwnMemory):
    """The answers of a backend that runs one layer at a time."""

    @property
    def decides_in_pass(self) -> bool:
        return False

    def run_layers(self, action: Action, hidden: Tensor, batch: Batch) -> Tensor | None:
        return None

    def run_pass(self, plan: PassPlan, token_ids: Sequence[int], batch: Batch) -> PassRun | None:
        return None

    def run_burst(
        self, plan: PassPlan, wanted: WantedBurst, batch: Batch, guessed: PassPlan | None = None
    ) -> Burst | None:
        return None

    @property
    def draw(self) -> DrawTokens | None:
        return None
