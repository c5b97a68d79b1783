"""Takes one sequence's rows through all layers of compiled programs in one native call.

Keeps the calls that it made. Knows rows and programs; knows no weights.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.evaluation import Evaluation
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.model_config import ModelConfig
from dash_runtime.programs.row_calls import ProgramCall, RowCalls, RowShape, can_be_called
from dash_runtime.programs.row_loop import RowLoop

CallsOf = Callable[[int, Evaluation | None], Mapping[Action, ProgramCall]]
"""Returns a layer's calls by action; with an evaluation, those that decide the next layer."""


class WholePasses:
    """Runs passes of one sequence with the native loop."""

    def __init__(self, loop: RowLoop, config: ModelConfig) -> None:
        self._loop = loop
        self._num_layers = config.num_layers
        self._windows = [window or 0 for window in config.sliding_window]
        self.has_windows = any(self._windows)
        """True if a layer does not attend to all positions before a row."""
        ropes = list(dict.fromkeys(config.ropes))
        self._rotary_of = [ropes.index(rope) for rope in config.ropes]
        self._first_layers = [config.ropes.index(rope) for rope in ropes]
        """For each rotary table, a layer that has it."""
        self._made: dict[tuple[int, int], tuple[object, RowCalls | None]] = {}
        self._pinned: tuple[Mapping[int, Action], bytes] = ({}, b"")

    def run(self, plan: PassPlan, hidden: Tensor, batch: Batch, source: object, calls_of: CallsOf) -> PassRun | None:
        """Runs the rows of the batch; returns None if native code cannot.

        Args:
            source: all that `calls_of` depends on beside its arguments, the number of rows included.
        """
        evaluation = plan.evaluation
        key = id(source), id(evaluation)
        if key not in self._made:  # what has the ids is kept, so that nothing else gets them
            self._made[key] = (source, evaluation), self._make(hidden, evaluation, calls_of)
        calls = self._made[key][1]
        if calls is None:
            return None
        (span,) = batch.spans
        tables = [batch.tables(layer) for layer in self._first_layers]
        costs = {} if evaluation is None else evaluation.layer_costs
        return PassRun(*calls.run(hidden, span.cache.memory, span.end, tables, self._as_bytes(plan.pinned), costs))

    def _make(self, hidden: Tensor, evaluation: Evaluation | None, calls_of: CallsOf) -> RowCalls | None:
        calls = []
        for layer in range(self._num_layers):
            decides = evaluation is not None and evaluation.inputs_by_layer[layer + 1]
            calls.append((calls_of(layer, None), calls_of(layer, evaluation) if decides else {}))
        if not can_be_called(calls):
            return None
        num_rows, hidden_size = hidden.shape
        shape = RowShape(num_rows, hidden_size, hidden.dtype, self._windows, self._rotary_of)
        try:
            return RowCalls(self._loop, shape, calls, None if evaluation is None else evaluation.exchange)
        except RuntimeError:  # a program's file may be gone since it was loaded
            return None

    def _as_bytes(self, pinned: Mapping[int, Action]) -> bytes:
        if self._pinned[0] is not pinned:  # a sequence's stays the same from token to token
            self._pinned = pinned, bytes(pinned.get(layer, 0) for layer in range(self._num_layers))
        return self._pinned[1]
