"""A trained policy: a network's best actions, at the price that keeps a budget.

Knows states and scores; knows no files (policy_file.py) and no training.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.devices import device_of
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.passes import Network, RowPlan
from dash_runtime.policy.budgets import BudgetCalibration, Budgets
from dash_runtime.policy.facts import Facts, RowFacts, shared_floats
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.network import NUM_SCALAR_FACTS, PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Actions, Decision, FixedPlan, Pending, State, own_or_finer


class Evaluator(Protocol):
    """Evaluates a network faster than tensors do."""

    def choose(self, layer: int, hidden: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Decides the block that begins with `layer`, in the calling thread.

        Returns the numbers of the best actions, int64 `[rows, block_size]`, and the scores, float32 `[rows, block_size,
        actions]`; from bf16 `hidden` `[rows, hidden_size]` and each row's facts and prices.
        """


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
    head_map: HeadMap | None = None
    """The map of its narrow head; None if its head is whole."""
    rounding: str | None = None
    """The rounded weights that it was calibrated with (`KeptRounding.identity`); None: each to the nearest."""
    evaluator: Evaluator | None = None
    """What evaluates it; None to evaluate eagerly."""
    decides_in_pass: bool = False
    """True if a pass may evaluate it, layer after layer, with nothing in between."""

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

    def skip_share(self, price: float) -> float:
        """Returns the share of the decided layers that it skips at a price of compute."""
        return self.calibration.counts(price).get(Action.SKIP, 0.0) / max(1, len(self.spec.free_layers))

    def unasked(self, price: float) -> FixedPlan:
        """Returns the plan of rows that do not ask it: each layer that it decides runs with the action that it chooses
        most often at this price, skips aside."""
        counts = dict(self.calibration.counts(price))
        for action in self.pinned.values():
            counts[action] = counts.get(action, 0.0) - 1
        usual = max(
            (action for action in self.spec.actions if action is not Action.SKIP), key=lambda own: counts.get(own, 0.0)
        )
        plan = tuple(self.pinned.get(layer, usual) for layer in range(self.spec.num_layers))
        return FixedPlan(plan, self.name, self.head, self.compensation)

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
        return Facts(self.network.num_known, self._action_costs)

    @property
    def _action_costs(self) -> list[float]:
        return [self.spec.costs.layer[action] for action in self.spec.actions]

    @cached_property
    def native_network(self) -> Network:
        """The network as passes are told of it."""
        network, spec = self.network, self.spec
        tensors = {field.name: getattr(network, field.name) for field in fields(network)}
        sizes = network.num_known, spec.num_layers, spec.decision_blocks, spec.actions
        return Network(tensors, *sizes, self.costs.layer)

    def new_row(self) -> tuple[RowFacts, RowPlan]:
        """Returns the plan of a row that it decides within its passes, and what it is told of each token."""
        numbers, tensor = shared_floats(self.num_facts)
        facts = RowFacts(numbers, self.network.num_known, self._action_costs)
        return facts, RowPlan(self.pinned, self.native_network, tensor)

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
        evaluator = self.evaluator if state.hidden.dtype is torch.bfloat16 else None
        if evaluator is None:
            device = device_of(state.hidden.device)
            results = device.download(self.evaluate(layer, state.hidden, device.upload(self.facts_of(state))))
            return lambda: self.decision(layer, results)
        _, num_layers = self._blocks[layer]
        best, scores = evaluator.choose(layer, state.hidden, self._facts.in_place(state))
        return lambda: self._decision(best[:, :num_layers], scores[:, :num_layers])

    def for_heads(self, heads: Sequence[Action]) -> "LearnedPolicy":
        """Returns the policy for a device with these precisions of the head: with its own, or the next finer one."""
        return replace(self, spec=replace(self.spec, head=own_or_finer(self.head, heads)))

    def lacks(self, actions: Collection[Action]) -> set[Action]:
        """Returns what it may choose or has pinned that is above all of these: nothing could take its place without
        other text."""
        return {own for own in (*self.spec.actions, *self.pinned.values()) if own > max(actions)}

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


def shared_head_map(policies: Sequence[LearnedPolicy]) -> HeadMap | None:
    """Returns the map of the narrow head that serves all policies: the first one's that has one."""
    return next((policy.head_map for policy in policies if policy.head_map is not None), None)
