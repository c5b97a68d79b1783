"""The network of a trained policy: small, on the lookahead state (DASH, arXiv 2505.17420).

It predicts what each action costs in divergence. The best action has the least predicted damage plus λ · cost, so one
network serves every budget. Knows tensors only.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

MAX_LOG_DAMAGE = 6.0
"""Limit of a predicted log damage. No token loses e^6 nats."""
NUM_SCALAR_FACTS = 3
"""Cost spent, log λ, (log λ)²."""


@dataclass(frozen=True, slots=True)
class PolicyNetwork:
    """Two hidden layers on the normalised hidden state and a few facts, float32. Their weights serve every block, so
    that they stay in the CPU's caches; biases, facts and outputs are a decision block's own.

    Shapes: `hidden_weight` `[width, hidden_size]`, `hidden_bias` `[num_blocks, width]`, `fact_weight` `[num_blocks,
    num_known + 3, width]`, `inner_weight` `[inner_width, width]`, `inner_bias` `[num_blocks, inner_width]`,
    `output_weight` `[num_blocks, block_size, num_actions, inner_width]`, `output_bias` `[num_blocks, block_size,
    num_actions]`. The first facts are the action that was taken last, one-hot, in the order of the actions' numbers.
    Outputs beyond the layers of a smaller last block are unused.
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    fact_weight: Tensor
    inner_weight: Tensor
    inner_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    @classmethod
    def shapes(
        cls,
        num_blocks: int,
        block_size: int,
        num_actions: int,
        hidden_size: int,
        num_known: int,
        width: int,
        inner_width: int,
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by its name."""
        return {
            "hidden_weight": (width, hidden_size),
            "hidden_bias": (num_blocks, width),
            "fact_weight": (num_blocks, num_known + NUM_SCALAR_FACTS, width),
            "inner_weight": (inner_width, width),
            "inner_bias": (num_blocks, inner_width),
            "output_weight": (num_blocks, block_size, num_actions, inner_width),
            "output_bias": (num_blocks, block_size, num_actions),
        }

    @property
    def hidden_size(self) -> int:
        """Channels of the state."""
        return self.hidden_weight.shape[1]

    @property
    def num_known(self) -> int:
        """Actions that may have been the last one."""
        return self.fact_weight.shape[1] - NUM_SCALAR_FACTS

    def rounded(self) -> "PolicyNetwork":
        """Returns the network with bf16 numbers in the weights of the state, which take the most memory: native code
        reads them as such, layer after layer."""
        return replace(self, hidden_weight=self.hidden_weight.to(torch.bfloat16).float())

    def to(self, device: torch.device) -> "PolicyNetwork":
        """Returns the same network on another device."""
        return PolicyNetwork(*(getattr(self, field.name).to(device) for field in fields(self)))

    def log_damages(self, block: int, hidden: Tensor, facts: Tensor) -> Tensor:
        """Returns the predicted log damage of each action in nats, float32 `[rows, block_size, num_actions]`.

        `hidden` is `[rows, hidden_size]` in any dtype, `facts` `[rows, num_known + 3]` (`facts_of`).
        """
        state = hidden.float()
        # Normalising the product instead of the state: one small vector instead of a large one.
        scale = state.shape[-1] ** 0.5 / torch.linalg.vector_norm(state, dim=-1, keepdim=True).clamp_min(1e-12)
        known = torch.addmm(self.hidden_bias[block], facts, self.fact_weight[block])
        features = functional.silu(torch.addcmul(known, functional.linear(state, self.hidden_weight), scale))
        inner = functional.silu(functional.linear(features, self.inner_weight, self.inner_bias[block]))
        outputs = torch.einsum("rw,law->rla", inner, self.output_weight[block]) + self.output_bias[block]
        return outputs.clamp(max=MAX_LOG_DAMAGE)

    def scores(self, block: int, hidden: Tensor, facts: Tensor, priced: Tensor) -> Tensor:
        """Returns float32 `[rows, block_size, num_actions]`; the action with the largest score is the best.

        `priced` is λ times each action's cost, `[num_actions]` or `[rows, 1, num_actions]`.
        """
        return -(self.log_damages(block, hidden, facts).exp() + priced)


def facts_of(last_actions: Tensor, cost_spent: Tensor, log_price: Tensor, num_known: int) -> Tensor:
    """Returns `[rows, num_known + 3]`; the arguments are `[rows]`, `last_actions` as int64 numbers."""
    last = functional.one_hot(last_actions - 1, num_known).float()
    return torch.cat((last, torch.stack((cost_spent, log_price, log_price.square()), dim=-1)), dim=-1)
