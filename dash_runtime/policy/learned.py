"""The policy that was trained: a small network on the lookahead state (DASH, arXiv 2505.17420).

One network serves every budget, since the price of compute λ is one of its inputs. Knows states and scores;
knows no files (policy_file.py) and no training.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.policy.policy import Actions, Decision, Pending, State, decision_blocks
from dash_runtime.programs.traced_policy import PolicyShape

NUM_SCALAR_FEATURES = 3
"""Cost spent, log λ, (log λ)²."""
_NUM_FACTS = len(Action) + NUM_SCALAR_FEATURES
_FACTS = struct.Struct(f"{_NUM_FACTS}f")
_LAST_ACTION = {last: tuple(float(action is last) for action in Action) for last in Action}
"""One-hot."""


@dataclass(frozen=True, slots=True)
class PolicyNetwork:
    """Two layers on `[normalised hidden | block embedding | action embedding | scalars]`, all float32.

    Shapes: `block_embedding` `[num_blocks, embedding_size]`, `action_embedding` `[4, embedding_size]` by Action's
    order, `input_weight` `[width, hidden_size + 2 · embedding_size + 3]`, `output_weight` `[num_blocks, block_size,
    num_actions, width]`, `output_bias` `[num_blocks, block_size, num_actions]`. Where the last block is smaller, what
    is beyond it is not used.
    """

    block_embedding: Tensor
    action_embedding: Tensor
    input_weight: Tensor
    input_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    @property
    def hidden_size(self) -> int:
        """Of the state."""
        return self.input_weight.shape[1] - 2 * self.block_embedding.shape[1] - NUM_SCALAR_FEATURES

    def fold(self) -> "FoldedNetwork":
        """The same function with everything multiplied out that does not depend on the hidden state."""
        embedding_size = self.block_embedding.shape[1]
        sizes = (self.hidden_size, embedding_size, self.action_embedding.shape[1], NUM_SCALAR_FEATURES)
        hidden, block, action, scalars = self.input_weight.split(sizes, dim=1)
        return FoldedNetwork(
            hidden,
            self.block_embedding @ block.T + self.input_bias,
            torch.cat((self.action_embedding @ action.T, scalars.T)),
            self.output_weight.flatten(1, 2),
            self.output_bias.flatten(1, 2),
            self.output_weight.shape[2],
        )

    def scores(self, block: int, hidden: Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
        """float32 `[rows, block_size, num_actions]` for the layers of one block.

        `hidden` `[rows, hidden_size]` in any dtype; the rest `[rows]`, `last_actions` as int64 numbers.
        """
        return self.fold().scores(block, hidden, _facts(last_actions, cost_spent, log_price))

    def all_scores(self, hidden: Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
        """The same for all blocks at once, `[num_blocks, rows, block_size, num_actions]`, as training wants it.

        `hidden` `[num_blocks, rows, hidden_size]`, and the rest `[num_blocks, rows]`: what was observed for each block.
        """
        folded = self.fold()
        num_blocks, num_rows = hidden.shape[:2]
        facts = _facts(last_actions, cost_spent, log_price) @ folded.fact_weight
        inner = folded.inner(hidden, folded.block_terms.unsqueeze(1) + facts)
        scores = torch.baddbmm(folded.output_bias.unsqueeze(1), inner, folded.output_weight.transpose(1, 2))
        return scores.view(num_blocks, num_rows, -1, folded.num_actions)


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """What is evaluated for every block and token.

    `block_terms` is `[num_blocks, width]`; `fact_weight` `[4 + 3, width]` takes the last action, one-hot, and the
    scalars; `output_weight` is `[num_blocks, block_size · num_actions, width]`.
    """

    hidden_weight: Tensor
    block_terms: Tensor
    fact_weight: Tensor
    output_weight: Tensor
    output_bias: Tensor
    num_actions: int

    def scores(self, block: int, hidden: Tensor, facts: Tensor) -> Tensor:
        """float32 `[rows, block_size, num_actions]` from `hidden` `[rows, hidden_size]` and `facts` `[rows, 7]`."""
        inner = self.inner(hidden, torch.addmm(self.block_terms[block], facts, self.fact_weight))
        scores = functional.linear(inner, self.output_weight[block], self.output_bias[block])
        return scores.view(len(hidden), -1, self.num_actions)

    def inner(self, hidden: Tensor, terms: Tensor) -> Tensor:
        """The inner features, `[..., width]`."""
        state = hidden.float()
        # Normalising the product instead of the state: one small vector instead of a large one.
        scale = state.shape[-1] ** 0.5 / torch.linalg.vector_norm(state, dim=-1, keepdim=True).clamp_min(1e-12)
        return functional.silu(torch.addcmul(terms, functional.linear(state, self.hidden_weight), scale))


def _facts(last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
    """`[..., 4 + 3]`: the last action, one-hot, then cost spent, log λ and its square."""
    last = functional.one_hot(last_actions - 1, len(Action)).float()
    return torch.cat((last, torch.stack((cost_spent, log_price, log_price.square()), dim=-1)), dim=-1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which price keeps which budget: `(budget, log λ)` in ascending order of budget.

    `divergences` are those that the policy came to at each point, in nats per token, on the text of the calibration;
    `recommended_budget` is the one to run at where nobody asks for another.
    """

    points: tuple[tuple[float, float], ...]
    divergences: tuple[float, ...]
    recommended_budget: float

    @property
    def lowest_budget(self) -> float:
        return self.points[0][0]

    def price(self, budget: float) -> float:
        """λ for a budget, between two calibrated ones by linear interpolation of log λ."""
        above = next((place for place, (point, _) in enumerate(self.points) if point >= budget), len(self.points))
        if above in (0, len(self.points)):
            return math.exp(self.points[min(above, len(self.points) - 1)][1])
        (low, log_low), (high, log_high) = self.points[above - 1 : above + 1]
        return math.exp(log_low + (budget - low) / (high - low) * (log_high - log_low))


@dataclass(frozen=True)
class LearnedPolicy:
    """A trained network with what it was trained for."""

    name: str
    network: PolicyNetwork
    actions: tuple[Action, ...]
    """The action of each score, in order."""
    pinned: frozenset[int]
    lookahead: int
    block_size: int
    head: Action
    compensation: Compensation
    costs: CostTable
    calibration: Calibration
    pinned_action: Action = Action.FULL
    is_drafter: bool = False
    """Whether it was trained to have its drafts accepted (mode EXACT) rather than to stay close to full depth."""
    program: Callable[[list[Tensor]], list[Tensor]] | None = None
    """`FewRowsPolicy`, compiled for `shape`. None: it is evaluated eagerly."""

    @property
    def score_actions(self) -> Actions:
        """See `policy.Policy`."""
        return self.actions

    @property
    def shape(self) -> PolicyShape:
        """What a program for it depends on."""
        network = self.network
        _, block_size, num_actions, width = network.output_weight.shape
        return PolicyShape(network.hidden_size, width, block_size, num_actions, len(Action) + NUM_SCALAR_FEATURES)

    @cached_property
    def _folded(self) -> FoldedNetwork:
        return self.network.fold()

    @cached_property
    def _blocks(self) -> dict[int, tuple[int, int]]:
        """By first layer: which block it begins, and how many layers that has."""
        blocks = decision_blocks(self.costs.num_layers, self.pinned, self.block_size)
        return {block[0]: (index, len(block)) for index, block in enumerate(blocks)}

    @cached_property
    def _alone(self) -> list[Actions]:
        """What is decided for a layer and a single row, by the index of its action."""
        return [(action,) for action in self.actions]

    @cached_property
    def _fact_buffers(self) -> dict[int, tuple[bytearray, Tensor]]:
        return {}

    @cached_property
    def _weights(self) -> list[list[Tensor]]:
        """By block, what the program is given beside the state."""
        folded = self._folded
        hidden, facts = folded.hidden_weight.contiguous(), folded.fact_weight.contiguous()
        blocks = zip(folded.block_terms, folded.output_weight, folded.output_bias, strict=True)
        return [[hidden, terms, facts, weight, bias] for terms, weight, bias in blocks]

    def start(self, layer: int, state: State) -> Pending:
        block, num_layers = self._blocks[layer]
        if self.program is not None:
            best, scores = self.program([state.hidden, self._facts_in_place(state), *self._weights[block]])
        else:
            scores = self._folded.scores(block, state.hidden, _facts_on(state))
            best = scores.argmax(dim=-1)
        if num_layers < self.block_size:
            best, scores = best[:, :num_layers], scores[:, :num_layers]
        if best.is_cuda:  # pinned, or the host would wait for the decoder's stream
            best = torch.empty(best.shape, dtype=best.dtype, pin_memory=True).copy_(best, non_blocking=True)

        def decide() -> Decision:
            rows = best.tolist()
            if len(rows) == 1:
                alone = self._alone
                return Decision(tuple([alone[index] for index in rows[0]]), scores)
            actions = self.actions
            by_layer = zip(*rows, strict=True)
            return Decision(tuple([tuple([actions[index] for index in own]) for own in by_layer]), scores)

        return decide

    def _facts_in_place(self, state: State) -> Tensor:
        """`[rows, 7]` in the tensor that an evaluation before had them in: a program is done with it once it returns,
        and with cold caches writing seven numbers takes a fifth of making a tensor."""
        num_rows = len(state.tokens)
        if num_rows not in self._fact_buffers:
            self._fact_buffers[num_rows] = _fact_buffer(num_rows)
        numbers, tensor = self._fact_buffers[num_rows]
        _write_facts(numbers, state)
        return tensor

    def without(self, unsupported: set[Action]) -> "LearnedPolicy":
        """The same policy where some actions have no kernel: their scores are dropped; pinned layers run FULL."""
        kept = [index for index, action in enumerate(self.actions) if action not in unsupported]
        network = replace(
            self.network,
            output_weight=self.network.output_weight[:, :, kept],
            output_bias=self.network.output_bias[:, :, kept],
        )
        pinned_action = Action.FULL if self.pinned_action in unsupported else self.pinned_action
        actions = tuple(self.actions[index] for index in kept)
        return replace(self, network=network, actions=actions, pinned_action=pinned_action)


def _facts_on(state: State) -> Tensor:
    """`[rows, 7]` on the state's device."""
    numbers, rows = _fact_buffer(len(state.tokens))
    _write_facts(numbers, state)
    # A pageable copy would make the host wait for the decoder's stream.
    return rows.pin_memory().to(state.hidden.device, non_blocking=True) if state.hidden.is_cuda else rows


def _fact_buffer(num_rows: int) -> tuple[bytearray, Tensor]:
    """Room for so many rows' facts, and the same memory as `[rows, 7]`."""
    numbers = bytearray(num_rows * _FACTS.size)
    return numbers, torch.frombuffer(numbers, dtype=torch.float32).view(-1, _NUM_FACTS)


def _write_facts(numbers: bytearray, state: State) -> None:
    """`_facts` of each row, without tensors."""
    place = 0
    for token, action, cost_spent in zip(state.tokens, state.actions, state.cost_spent, strict=True):
        log_price = math.log(token.price)
        _FACTS.pack_into(numbers, place, *_LAST_ACTION[action], cost_spent, log_price, log_price * log_price)
        place += _FACTS.size
