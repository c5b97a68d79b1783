"""The policy that was trained: a small network on the lookahead state (DASH, arXiv 2505.17420).

One network serves every budget, since the price of compute λ is one of its inputs. Knows states and scores;
knows no files (policy_file.py) and no training.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.policy.policy import Decision, Pending, State, Token

NUM_SCALAR_FEATURES = 3
"""Cost spent, log λ, (log λ)²."""


@dataclass(frozen=True, slots=True)
class PolicyNetwork:
    """Two layers on `[normalised hidden | layer embedding | action embedding | scalars]`, all float32.

    Shapes: `layer_embedding` `[num_layers, embedding_size]`, `action_embedding` `[4, embedding_size]` by
    Action's order, `input_weight` `[width, hidden_size + 2 · embedding_size + 3]`, `output_weight`
    `[num_actions, width]`.
    """

    layer_embedding: Tensor
    action_embedding: Tensor
    input_weight: Tensor
    input_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    def fold(self) -> "FoldedNetwork":
        """The same function with everything multiplied out that does not depend on the hidden state."""
        hidden_size = self.input_weight.shape[1] - 2 * self.layer_embedding.shape[1] - NUM_SCALAR_FEATURES
        sizes = (hidden_size, self.layer_embedding.shape[1], self.action_embedding.shape[1], NUM_SCALAR_FEATURES)
        hidden, layer, action, scalars = self.input_weight.split(sizes, dim=1)
        return FoldedNetwork(
            hidden,
            self.layer_embedding @ layer.T + self.input_bias,
            torch.cat((self.action_embedding @ action.T, scalars.T)),
            self.output_weight,
            self.output_bias,
        )

    def scores(
        self, hidden: Tensor, layer: int | Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor
    ) -> Tensor:
        """float32 `[rows, num_actions]`.

        `hidden` `[rows, hidden_size]` in any dtype; the rest `[rows]`, `last_actions` as int64 numbers. `layer` is one
        for all rows, or int64 `[rows]`.
        """
        last = functional.one_hot(last_actions - 1, len(Action)).float()
        facts = torch.cat((last, torch.stack((cost_spent, log_price, log_price.square()), dim=-1)), dim=-1)
        return self.fold().scores(hidden, layer, facts)


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """What is evaluated for every layer and token.

    `layer_terms` is `[num_layers, width]`; `fact_weight` `[4 + 3, width]` takes the last action, one-hot, and the
    scalars.
    """

    hidden_weight: Tensor
    layer_terms: Tensor
    fact_weight: Tensor
    output_weight: Tensor
    output_bias: Tensor

    def scores(self, hidden: Tensor, layer: int | Tensor, facts: Tensor) -> Tensor:
        """float32 `[rows, num_actions]` from `hidden` `[rows, hidden_size]` and `facts` `[rows, 7]`."""
        state = hidden.float()
        # Normalising the product instead of the state: one small vector instead of a large one.
        scale = state.shape[-1] ** 0.5 / torch.linalg.vector_norm(state, dim=-1, keepdim=True).clamp_min(1e-12)
        terms = torch.addmm(self.layer_terms[layer], facts, self.fact_weight)
        inner = functional.silu(torch.addcmul(terms, functional.linear(state, self.hidden_weight), scale))
        return functional.linear(inner, self.output_weight, self.output_bias)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which price keeps which budget: `(budget, log λ)` in ascending order of budget."""

    points: tuple[tuple[float, float], ...]

    @property
    def lowest_budget(self) -> float:
        return self.points[0][0]

    def price(self, budget: float) -> float:
        """λ for a budget: that of the largest calibrated budget within it, so that the bound holds."""
        within = [log_price for point, log_price in self.points if point <= budget]
        return math.exp(within[-1] if within else self.points[0][1])


@dataclass(frozen=True)
class LearnedPolicy:
    """A trained network with what it was trained for."""

    name: str
    network: PolicyNetwork
    actions: tuple[Action, ...]
    """The action of each score, in order."""
    pinned: frozenset[int]
    lookahead: int
    head: Action
    compensation: Compensation
    costs: CostTable
    calibration: Calibration

    @cached_property
    def _folded(self) -> FoldedNetwork:
        return self.network.fold()

    def start(self, layer: int, state: State) -> Pending:
        device = state.hidden.device
        facts = torch.tensor([*map(_facts, state.tokens, state.actions, state.cost_spent)])
        # Pinned memory both ways: a pageable copy would make the host wait for the decoder's stream.
        if device.type == "cuda":
            facts = facts.pin_memory().to(device, non_blocking=True)
        scores = self._folded.scores(state.hidden, layer, facts)
        best = scores.argmax(dim=-1)
        if device.type == "cuda":
            best = torch.empty(best.shape, dtype=best.dtype, pin_memory=True).copy_(best, non_blocking=True)
        return lambda: Decision(tuple(self.actions[index] for index in best.tolist()), scores)

    def without(self, unsupported: set[Action]) -> "LearnedPolicy":
        """The same policy where some actions have no kernel: those scores are dropped."""
        kept = [index for index, action in enumerate(self.actions) if action not in unsupported]
        network = replace(
            self.network,
            output_weight=self.network.output_weight[kept],
            output_bias=self.network.output_bias[kept],
        )
        return replace(self, network=network, actions=tuple(self.actions[index] for index in kept))


def _facts(token: Token, action: Action, cost_spent: float) -> list[float]:
    """The last action, one-hot, then cost spent, log λ and its square."""
    log_price = math.log(token.price)
    last = [0.0] * len(Action)
    last[action - 1] = 1.0
    return [*last, cost_spent, log_price, log_price * log_price]
