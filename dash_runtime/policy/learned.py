"""A trained policy: a network's best actions, at the price that keeps a budget.

Knows states and scores; knows no files (policy_file.py) and no training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.devices import device_of
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.budgets import BudgetCalibration, Budgets
from dash_runtime.policy.facts import Facts
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.network import NUM_SCALAR_FACTS, PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Actions, Decision, Pending, State
from dash_runtime.policy.row_evaluation import NetworkInputs, RowEvaluation
from dash_runtime.programs.program_cache import Program
from dash_runtime.programs.traced_policy import PolicyShape


@dataclass(frozen=True)
class LearnedPolicy:
    """A trained network with the terms that it was trained for; a `policy.Policy`."""

    name: str
    network: PolicyNetwork
    spec: PlanSpec
    compensation: Compensation
    calibration: BudgetCalibration
    plans: tuple[MeasuredPlan, ...] = ()
    """Fixed plans that were searched and measured on the text of the calibration, with the same compensation."""
    is_drafter: bool = False
    """True if it was trained to have its drafts accepted (mode EXACT) instead of to stay close to full depth."""
    program: Callable[[list[Tensor]], list[Tensor]] | None = None
    """`FewRowsPolicy`, compiled for `shape`; None to evaluate eagerly."""
    layer_programs: Mapping[Action, Program] | None = None
    """The programs of layers that evaluate this policy as well (`row_evaluation.py`), by action; None if there are
    none."""

    @property
    def score_actions(self) -> Actions:
        return self.spec.actions

    @property
    def pinned(self) -> Mapping[int, Action]:
        return self.spec.pinned

    @property
    def num_evaluations(self) -> int:
        return self.spec.num_evaluations

    @property
    def lookahead(self) -> int:
        return self.spec.lookahead

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def kv_action(self) -> Action:
        return self.spec.kv_action

    @property
    def head(self) -> Action:
        return self.spec.head

    @property
    def costs(self) -> CostTable:
        """The table that it was trained with: what it is told about the cost spent is in its unit."""
        return self.spec.costs

    def budgets(self, costs: CostTable) -> Budgets:
        """Returns the budgets that it can keep at a device's costs."""
        return self.calibration.budgets(self.spec, costs)

    def recommended_budget(self, costs: CostTable) -> float:
        """Returns the budget of requests that name the policy, and so want no fixed plan, and set no budget."""
        budgets = self.budgets(costs)
        return budgets.best_for_drafting if self.is_drafter else budgets.recommended

    @property
    def shape(self) -> PolicyShape:
        """The shapes that a program for it depends on."""
        network = self.network
        _, block_size, num_actions, inner_width = network.output_weight.shape
        num_facts = network.num_known + NUM_SCALAR_FACTS
        width = network.hidden_weight.shape[0]
        return PolicyShape(network.hidden_size, width, inner_width, block_size, num_actions, num_facts)

    @cached_property
    def _blocks(self) -> dict[int, tuple[int, int]]:
        """By first layer, the number of the block that begins there and the number of its layers."""
        return {block[0]: (number, len(block)) for number, block in enumerate(self.spec.decision_blocks)}

    @cached_property
    def _alone(self) -> list[Actions]:
        """The actions of a layer for a single row, by the index of its action."""
        return [(action,) for action in self.spec.actions]

    @cached_property
    def _facts(self) -> Facts:
        return Facts(self.network.num_known, [self.spec.costs.layer[action] for action in self.spec.actions])

    @cached_property
    def _weights(self) -> list[list[Tensor]]:
        """By block, the program's arguments after the state and its facts."""
        network = self.network
        outputs = (network.output_weight.flatten(1, 2), network.output_bias.flatten(1, 2))
        blocks = zip(network.hidden_bias, network.fact_weight, network.inner_bias, *outputs, strict=True)
        return [[network.hidden_weight, bias, facts, network.inner_weight, *others] for bias, facts, *others in blocks]

    @cached_property
    def _row_evaluations(self) -> list[RowEvaluation]:
        return []

    @cached_property
    def _network_inputs(self) -> NetworkInputs:
        return NetworkInputs(self.network, self.spec)

    def row_evaluations(self, num_rows: int) -> Sequence[RowEvaluation]:
        """Returns an evaluation for each of so many rows; the same ones every time."""
        assert self.layer_programs is not None
        made = self._row_evaluations
        while len(made) < num_rows:
            made.append(RowEvaluation(self._network_inputs, self.spec, self.layer_programs))
        return made[:num_rows]

    @cached_property
    def _networks(self) -> dict[torch.device, PolicyNetwork]:
        return {self.network.hidden_weight.device: self.network}

    def _network_on(self, device: torch.device) -> PolicyNetwork:
        """Returns the network on the device of an observed layer. Each device gets a copy when it first needs one."""
        if device not in self._networks:
            self._networks[device] = self.network.to(device)
        return self._networks[device]

    @property
    def num_facts(self) -> int:
        """The numbers that an evaluation is told of a row beside its state."""
        return self.network.num_known + NUM_SCALAR_FACTS + len(self.spec.actions)

    def facts_of(self, state: State) -> Tensor:
        """Returns what an evaluation is told beside the state, a new float32 `[rows, num_facts]` on the host."""
        return self._facts.apart(state)

    def evaluate(self, layer: int, hidden: Tensor, facts: Tensor) -> Tensor:
        """Returns, for the block that begins with `layer`, the index of the best action and then all scores.

        Float32 `[rows, block_size, 1 + actions]`, on the device of `hidden` `[rows, hidden_size]` and `facts`.
        """
        block, _ = self._blocks[layer]
        own, priced = facts.tensor_split((-len(self.spec.actions),), dim=1)
        scores = self._network_on(hidden.device).scores(block, hidden, own, priced.unsqueeze(1))
        return torch.cat((scores.argmax(dim=-1, keepdim=True).float(), scores), dim=-1)

    def decision(self, layer: int, results: Tensor) -> Decision:
        """Returns what `evaluate` decided, from its result on the host."""
        _, num_layers = self._blocks[layer]
        return self._decision(results[:, :num_layers, 0].int(), results[:, :num_layers, 1:])

    def _decision(self, best: Tensor, scores: Tensor) -> Decision:
        rows = best.tolist()
        if len(rows) == 1:
            alone = self._alone
            return Decision(tuple([alone[index] for index in rows[0]]), scores)
        actions = self.spec.actions
        by_layer = zip(*rows, strict=True)
        return Decision(tuple([tuple([actions[index] for index in own]) for own in by_layer]), scores)

    def start(self, layer: int, state: State) -> Pending:
        if self.program is None:
            device = device_of(state.hidden.device)
            results = device.download(self.evaluate(layer, state.hidden, device.upload(self.facts_of(state))))
            return lambda: self.decision(layer, results)
        block, num_layers = self._blocks[layer]
        best, scores = self.program([state.hidden, self._facts.in_place(state), *self._weights[block]])
        return lambda: self._decision(best[:, :num_layers], scores[:, :num_layers])

    def without(self, unsupported: set[Action]) -> "LearnedPolicy":
        """Returns the policy for a device that has no kernel for some actions.

        Their scores are dropped; pinned layers and the head run FULL if their action is one of them.
        """

        def supported_or_full(action: Action) -> Action:
            return Action.FULL if action in unsupported else action

        kept = [index for index, action in enumerate(self.spec.actions) if action not in unsupported]
        network = replace(
            self.network,
            output_weight=self.network.output_weight[:, :, kept],
            output_bias=self.network.output_bias[:, :, kept],
        )
        spec = replace(
            self.spec,
            actions=tuple(self.spec.actions[index] for index in kept),
            pinned={layer: supported_or_full(action) for layer, action in self.pinned.items()},
            head=supported_or_full(self.head),
        )
        return replace(self, network=network, spec=spec, calibration=self.calibration.without(unsupported))
