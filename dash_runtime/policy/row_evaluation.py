"""Evaluates a learned policy for one row within the layers' own programs.

Its tensors are made once and used for every token: making them would cost more than the evaluation. Knows a policy's
network; knows no decoder.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.policy.facts import RowFacts, shared_floats
from dash_runtime.policy.network import NUM_SCALAR_FACTS, PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Actions, Token
from dash_runtime.programs.program_cache import Program
from dash_runtime.programs.row_calls import Exchange
from dash_runtime.programs.traced_deciding import packed_matrix, packed_terms


class NetworkInputs:
    """A network as inputs of programs (`traced_deciding.py`), for all rows."""

    def __init__(self, network: PolicyNetwork, spec: PlanSpec) -> None:
        self.num_known = network.num_known
        # All layers read the same memory.
        shared = packed_matrix(network.hidden_weight), packed_matrix(network.inner_weight)
        own = (network.hidden_bias, network.fact_weight, network.inner_bias)
        outputs = (network.output_weight.flatten(1, 2), network.output_bias.flatten(1, 2))
        layers = zip(spec.decision_blocks, *own, *outputs, strict=True)
        self.by_layer = {layer: (*shared, packed_terms(*terms)) for (layer, *_), *terms in layers}


class RowEvaluation:
    """One row's evaluations, one layer after another; a `layers.evaluation.Evaluation`."""

    def __init__(self, network: NetworkInputs, spec: PlanSpec, programs: Mapping[Action, Program]) -> None:
        self.programs = programs
        num_actions = len(spec.actions)
        self._first_result = network.num_known + NUM_SCALAR_FACTS + num_actions
        self._numbers, exchanged = shared_floats(self._first_result + 1 + num_actions)
        self.exchange = Exchange(exchanged, network.num_known, self._first_result, spec.actions)
        self._scores = self._numbers[self._first_result + 1 :]
        action_costs = [spec.costs.layer[action] for action in spec.actions]
        self._facts = RowFacts(self._numbers, network.num_known, action_costs)
        layers = range(spec.num_layers + 1)
        self.inputs_by_layer: Sequence[Sequence[Tensor]] = [
            [exchanged, *network.by_layer[layer]] if layer in network.by_layer else () for layer in layers
        ]
        self.layer_costs: Mapping[Action, float] = {}
        self._cost_spent = 0.0
        self._alone: list[Actions] = [(action,) for action in spec.actions]

    def begin(self, token: Token, costs: CostTable) -> None:
        """Begins a token. The table is for the share of cost already spent."""
        self.layer_costs, self._cost_spent = costs.layer, 0.0
        self._facts.begin(token)

    def observe(self, layer: int, action: Action) -> None:
        """Takes in the action of a layer, in whose program the next `layer` is decided."""
        self._cost_spent = spent = self._cost_spent + self.layer_costs[action]
        if self.inputs_by_layer[layer]:
            self._facts.update(action, spent)

    def chosen(self) -> Actions:
        """Returns the action that the last evaluation chose, as the actions of a single row."""
        return self._alone[int(self._numbers[self._first_result])]

    def scores(self) -> bytes:
        """Returns the last evaluation's float32 scores."""
        return self._scores.tobytes()
