"""The compiled part of a learned policy: `FoldedNetwork.scores`, and the best action of each layer.

To be traced, not run eagerly. Knows tensors only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class PolicyShape:
    """Everything that the program depends on. `block_size` is the number of layers that are decided together."""

    hidden_size: int
    width: int
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
        output_weight: Tensor,
        output_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns indices of actions `[rows, block_size]` and float32 scores `[rows, block_size, num_actions]`.

        `hidden` is `[rows, hidden_size]`, `facts` `[rows, facts]`. The block has `terms` `[width]`, `output_weight`
        `[block_size * num_actions, width]` and `output_bias` `[block_size * num_actions]`. The whole network has
        `hidden_weight` `[width, hidden_size]` and `fact_weight` `[facts, width]`.
        """
        state = hidden.float()
        scale = state.shape[-1] ** 0.5 * torch.rsqrt(state.square().sum(-1, keepdim=True).clamp_min(1e-24))
        known = terms + (facts.unsqueeze(-1) * fact_weight).sum(1)
        inner = functional.silu(known + (hidden_weight * state.unsqueeze(1)).sum(-1) * scale)
        outputs = (output_weight * inner.unsqueeze(1)).sum(-1) + output_bias
        scores = outputs.view(-1, self._shape.block_size, self._shape.num_actions)
        return scores.argmax(dim=-1), scores
