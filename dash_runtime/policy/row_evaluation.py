"""Evaluates a learned policy for one row within the layers' own programs.

Its tensors are made once and used for every token: making them would cost more than the evaluation. Knows a policy's
network; knows no decoder.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.policy.facts import RowFacts, shared_floats
from dash_runtime.policy.network import NUM_SCALAR_FEATURES, FoldedNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Actions, Token
from dash_runtime.programs.program_cache import Program
from dash_runtime.programs.traced_deciding import packed_matrix, packed_terms


class NetworkInputs:
    """A folded network as inputs of programs (`traced_deciding.py`), for all rows."""

    def __init__(self, network: FoldedNetwork, spec: PlanSpec) -> None:
        self.num_known = network.fact_weight.shape[0] - NUM_SCALAR_FEATURES
        matrix = packed_matrix(network.hidden_weight)  # all layers read the same memory
        blocks = zip(spec.decision_blocks, network.block_terms, network.output_weight, network.output_bias, strict=True)
        self.by_layer = {
            layer: (matrix, packed_terms(terms, network.fact_weight, weight, bias))
            for (layer, *_), terms, weight, bias in blocks
        }


class RowEvaluation:
    """One row's evaluations, one layer after another; a `layers.evaluation.Evaluation`."""

    def __init__(self, network: NetworkInputs, spec: PlanSpec, programs: Mapping[Action, Program]) -> None:
        self.programs = programs
        self.inputs: Sequence[Tensor] = ()
        self._first_result = network.num_known + NUM_SCALAR_FEATURES
        self._numbers, exchanged = shared_floats(self._first_result + 1 + len(spec.actions))
        self._scores = self._numbers[self._first_result + 1 :]
        self._facts = RowFacts(self._numbers, network.num_known)
        layers = range(spec.num_layers + 1)
        self._by_layer = [
            [exchanged, *network.by_layer[layer]] if layer in network.by_layer else () for layer in layers
        ]
        self._layer_costs: Mapping[Action, float] = {}
        self._cost_spent = 0.0
        self._alone: list[Actions] = [(action,) for action in spec.actions]

    def begin(self, token: Token, costs: CostTable) -> None:
        """Begins a token. The table is for the share of cost already spent."""
        self._layer_costs, self._cost_spent = costs.layer, 0.0
        self._facts.begin(token)

    def observe(self, layer: int, action: Action) -> None:
        """Takes in the action of a layer, in whose program the next `layer` is decided."""
        self._cost_spent = spent = self._cost_spent + self._layer_costs[action]
        inputs = self.inputs = self._by_layer[layer]
        if inputs:
            self._facts.update(action, spent)

    def chosen(self) -> Actions:
        """Returns the action that the last evaluation chose, as the actions of a single row."""
        return self._alone[int(self._numbers[self._first_result])]

    def scores(self) -> bytes:
        """Returns the last evaluation's float32 scores."""
        return self._scores.tobytes()
