"""The policy that was trained: a small network on the lookahead state (DASH, arXiv 2505.17420).

One network serves every budget, since the price of compute λ is one of its inputs. Knows states and scores;
knows no files (policy_file.py) and no training.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.policy.policy import Decision, Pending, State

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

    def scores(
        self, hidden: Tensor, layer: int | Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor
    ) -> Tensor:
        """float32 `[rows, num_actions]`.

        `hidden` `[rows, hidden_size]` in any dtype; the rest `[rows]`, `last_actions` as int64 numbers. `layer` is one
        for all rows, or int64 `[rows]`.
        """
        normalised = functional.rms_norm(hidden.float(), (hidden.shape[-1],))
        features = torch.cat(
            (
                normalised,
                self.layer_embedding[layer].expand(len(hidden), -1),
                self.action_embedding[last_actions - 1],
                torch.stack((cost_spent, log_price, log_price.square()), dim=-1),
            ),
            dim=-1,
        )
        inner = functional.silu(functional.linear(features, self.input_weight, self.input_bias))
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

    def start(self, layer: int, state: State) -> Pending:
        device = state.hidden.device
        log_prices = [math.log(token.price) for token in state.tokens]
        scalars = torch.tensor([*zip(state.actions, state.cost_spent, log_prices, strict=True)])
        # Pinned memory both ways: a pageable copy would make the host wait for the decoder's stream.
        if device.type == "cuda":
            scalars = scalars.pin_memory().to(device, non_blocking=True)
        last_actions, cost_spent, log_price = scalars.unbind(dim=-1)
        scores = self.network.scores(state.hidden, layer, last_actions.long(), cost_spent, log_price)
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
