"""A trained policy: a network's best actions, at the price that keeps a budget.

Knows states and scores; knows no files (policy_file.py) and no training.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.devices import device_of
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.network import NUM_SCALAR_FACTS, PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Actions, Decision, Pending, State
from dash_runtime.programs.traced_policy import PolicyShape


@dataclass(frozen=True, slots=True)
class BudgetCalibration:
    """The price that keeps each budget: `points` are `(budget, log λ)` in ascending order of budget.

    `divergences` are the policy's at each point, in nats per token, on the text of the calibration.
    `recommended_budget` is the one to run at unless a request sets another.
    """

    points: tuple[tuple[float, float], ...]
    divergences: tuple[float, ...]
    recommended_budget: float

    @property
    def lowest_budget(self) -> float:
        return self.points[0][0]

    def price(self, budget: float) -> float:
        """Returns λ for a budget. Between two calibrated budgets log λ is interpolated linearly."""
        above = next((place for place, (point, _) in enumerate(self.points) if point >= budget), len(self.points))
        if above in (0, len(self.points)):
            return math.exp(self.points[min(above, len(self.points) - 1)][1])
        (low, log_low), (high, log_high) = self.points[above - 1 : above + 1]
        return math.exp(log_low + (budget - low) / (high - low) * (log_high - log_low))


class _Facts:
    """Packs what a network is told beside the hidden state, without making tensors.

    A row is `[num_known + 3 + num_actions]`: the last action, one-hot; cost spent, log λ and its square; then λ times
    the cost of each action.
    """

    def __init__(self, num_known: int, action_costs: Sequence[float]) -> None:
        self._row = struct.Struct(f"{num_known + NUM_SCALAR_FACTS + len(action_costs)}f")
        known = range(1, num_known + 1)
        self._one_hot = {last: tuple(float(row == last) for row in known) for last in known}
        self._priced = lru_cache(lambda price: tuple(price * cost for cost in action_costs))
        self._buffers: dict[int, tuple[bytearray, Tensor]] = {}

    def in_place(self, state: State) -> Tensor:
        """Returns the rows in the tensor of the last call with as many rows.

        A program has read it once it returns. With cold caches, writing the numbers takes a fifth of the time of making
        a tensor.
        """
        num_rows = len(state.tokens)
        if num_rows not in self._buffers:
            self._buffers[num_rows] = self._buffer(num_rows)
        numbers, tensor = self._buffers[num_rows]
        self._write(numbers, state)
        return tensor

    def on_device(self, state: State) -> Tensor:
        """Returns the rows in a new tensor on the state's device."""
        numbers, rows = self._buffer(len(state.tokens))
        self._write(numbers, state)
        return device_of(state.hidden.device).upload(rows)

    def _buffer(self, num_rows: int) -> tuple[bytearray, Tensor]:
        """Returns zeros for so many rows, and a tensor over the same memory."""
        numbers = bytearray(num_rows * self._row.size)
        return numbers, torch.frombuffer(numbers, dtype=torch.float32).view(num_rows, -1)

    def _write(self, numbers: bytearray, state: State) -> None:
        place = 0
        for token, action, cost_spent in zip(state.tokens, state.actions, state.cost_spent, strict=True):
            log_price = math.log(token.price)
            scalars = (cost_spent, log_price, log_price * log_price)
            self._row.pack_into(numbers, place, *self._one_hot[action], *scalars, *self._priced(token.price))
            place += self._row.size


@dataclass(frozen=True)
class LearnedPolicy:
    """A trained network with the terms that it was trained for; a `policy.Policy`."""

    name: str
    network: PolicyNetwork
    spec: PlanSpec
    compensation: Compensation
    calibration: BudgetCalibration
    is_drafter: bool = False
    """True if it was trained to have its drafts accepted (mode EXACT) instead of to stay close to full depth."""
    program: Callable[[list[Tensor]], list[Tensor]] | None = None
    """`FewRowsPolicy`, compiled for `shape`; None to evaluate eagerly."""

    @property
    def score_actions(self) -> Actions:
        return self.spec.actions

    @property
    def pinned(self) -> frozenset[int]:
        return self.spec.pinned

    @property
    def pinned_action(self) -> Action:
        return self.spec.pinned_action

    @property
    def lookahead(self) -> int:
        return self.spec.lookahead

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def head(self) -> Action:
        return self.spec.head

    @property
    def costs(self) -> CostTable:
        return self.spec.costs

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
    def _facts(self) -> _Facts:
        return _Facts(self.network.num_known, [self.spec.costs.layer[action] for action in self.spec.actions])

    @cached_property
    def _weights(self) -> list[list[Tensor]]:
        """By block, the program's arguments after the state and its facts."""
        network = self.network
        outputs = (network.output_weight.flatten(1, 2), network.output_bias.flatten(1, 2))
        blocks = zip(network.hidden_bias, network.fact_weight, network.inner_bias, *outputs, strict=True)
        return [
            [network.hidden_weight, bias, facts, network.inner_weight, *others] for bias, facts, *others in blocks
        ]

    def start(self, layer: int, state: State) -> Pending:
        block, num_layers = self._blocks[layer]
        if self.program is not None:
            best, scores = self.program([state.hidden, self._facts.in_place(state), *self._weights[block]])
        else:
            facts, priced = self._facts.on_device(state).tensor_split((-len(self.spec.actions),), dim=1)
            scores = self.network.scores(block, state.hidden, facts, priced.unsqueeze(1))
            best = scores.argmax(dim=-1)
        if num_layers < self.spec.block_size:
            best, scores = best[:, :num_layers], scores[:, :num_layers]
        best = device_of(best.device).download(best)

        def decide() -> Decision:
            rows = best.tolist()
            if len(rows) == 1:
                alone = self._alone
                return Decision(tuple([alone[index] for index in rows[0]]), scores)
            actions = self.spec.actions
            by_layer = zip(*rows, strict=True)
            return Decision(tuple([tuple([actions[index] for index in own]) for own in by_layer]), scores)

        return decide

    def without(self, unsupported: set[Action]) -> "LearnedPolicy":
        """Returns the policy for a device that has no kernel for some actions.

        Their scores are dropped, and pinned layers run FULL if their action is one of them.
        """
        kept = [index for index, action in enumerate(self.spec.actions) if action not in unsupported]
        network = replace(
            self.network,
            output_weight=self.network.output_weight[:, :, kept],
            output_bias=self.network.output_bias[:, :, kept],
        )
        spec = replace(
            self.spec,
            actions=tuple(self.spec.actions[index] for index in kept),
            pinned_action=Action.FULL if self.pinned_action in unsupported else self.pinned_action,
        )
        return replace(self, network=network, spec=spec)
