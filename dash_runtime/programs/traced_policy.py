"""The compiled part of a learned policy: `PolicyNetwork.scores`, and the best action of each layer.

To be traced, not run eagerly. Knows tensors only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_LOG_DAMAGE = 6.0
"""Limit of a predicted log damage. No token loses e^6 nats."""


@dataclass(frozen=True, slots=True)
class PolicyShape:
    """Everything that the program depends on. `block_size` is the number of layers that are decided together."""

    hidden_size: int
    width: int
    inner_width: int
    block_size: int
    num_actions: int
    num_facts: int


class FewRowsPolicy(nn.Module):
    """Scores and choices of one block. A row's are the same whatever other rows are with it."""

    def __init__(self, shape: PolicyShape) -> None:
        super().__init__()
        self._shape = shape

    def forward(
        self,
        hidden: Tensor,
        facts: Tensor,
        hidden_weight: Tensor,
        terms: Tensor,
        fact_weight: Tensor,
        inner_weight: Tensor,
        inner_terms: Tensor,
        output_weight: Tensor,
        output_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns indices of actions `[rows, block_size]` and float32 scores `[rows, block_size, num_actions]`.

        `hidden` is `[rows, hidden_size]`, `facts` `[rows, num_facts + num_actions]`: the facts, then λ times the cost
        of each action. The block has `terms` `[width]`, `fact_weight` `[num_facts, width]`, `inner_terms`
        `[inner_width]`, `output_weight` `[block_size * num_actions, inner_width]` and `output_bias` `[block_size *
        num_actions]`. All blocks share `hidden_weight` `[width, hidden_size]` and `inner_weight` `[inner_width,
        width]`.
        """
        state = hidden.float()
        scale = state.shape[-1] ** 0.5 * torch.rsqrt(state.square().sum(-1, keepdim=True).clamp_min(1e-24))
        facts, priced = facts.tensor_split((self._shape.num_facts,), dim=1)
        known = terms + (facts.unsqueeze(-1) * fact_weight).sum(1)
        features = functional.silu(known + (hidden_weight * state.unsqueeze(1)).sum(-1) * scale)
        inner = functional.silu(inner_terms + (inner_weight * features.unsqueeze(1)).sum(-1))
        outputs = (output_weight * inner.unsqueeze(1)).sum(-1) + output_bias
        scores = action_scores(outputs.view(-1, self._shape.block_size, self._shape.num_actions), priced.unsqueeze(1))
        return scores.argmax(dim=-1), scores


def action_scores(outputs: Tensor, priced_costs: Tensor) -> Tensor:
    """Returns the scores of actions from their predicted log damages, and their costs times the price of compute."""
    return -(outputs.clamp(max=MAX_LOG_DAMAGE).exp() + priced_costs)
