"""The network of a trained policy: small, on the lookahead state (DASH, arXiv 2505.17420).

One network serves every budget, since the price of compute λ is one of its inputs. Knows tensors only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

NUM_SCALAR_FEATURES = 3
"""Cost spent, log λ, (log λ)²."""


@dataclass(frozen=True, slots=True)
class PolicyNetwork:
    """Two layers on `[normalised hidden | block embedding | action embedding | scalars]`, all float32.

    Shapes: `block_embedding` `[num_blocks, embedding_size]`, `action_embedding` `[num_known, embedding_size]` with the
    row of each action that may have been the last one, in the order of their numbers, `input_weight` `[width,
    hidden_size + 2 · embedding_size + 3]`, `output_weight` `[num_blocks, block_size, num_actions, width]`,
    `output_bias` `[num_blocks, block_size, num_actions]`. Scores beyond the layers of a smaller last block are unused.
    """

    block_embedding: Tensor
    action_embedding: Tensor
    input_weight: Tensor
    input_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    @property
    def hidden_size(self) -> int:
        """Channels of the state."""
        return self.input_weight.shape[1] - 2 * self.block_embedding.shape[1] - NUM_SCALAR_FEATURES

    @property
    def num_known(self) -> int:
        """Actions that may have been the last one."""
        return self.action_embedding.shape[0]

    def fold(self) -> "FoldedNetwork":
        """Returns the same function with every product that does not depend on the hidden state computed once."""
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
        """Returns float32 `[rows, block_size, num_actions]` for the layers of one block.

        `hidden` is `[rows, hidden_size]` in any dtype; the rest is `[rows]`, `last_actions` as int64 numbers.
        """
        return self.fold().scores(block, hidden, self._facts(last_actions, cost_spent, log_price))

    def all_scores(self, hidden: Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
        """Returns the scores of all blocks at once, `[num_blocks, rows, block_size, num_actions]`, for training.

        `hidden` is `[num_blocks, rows, hidden_size]`, the rest `[num_blocks, rows]`: each block's observations.
        """
        folded = self.fold()
        num_blocks, num_rows = hidden.shape[:2]
        facts = self._facts(last_actions, cost_spent, log_price) @ folded.fact_weight
        inner = folded.inner(hidden, folded.block_terms.unsqueeze(1) + facts)
        scores = torch.baddbmm(folded.output_bias.unsqueeze(1), inner, folded.output_weight.transpose(1, 2))
        return scores.view(num_blocks, num_rows, -1, folded.num_actions)

    def _facts(self, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
        """Returns `[..., num_known + 3]`: the last action, one-hot, then cost spent, log λ and its square."""
        last = functional.one_hot(last_actions - 1, self.num_known).float()
        return torch.cat((last, torch.stack((cost_spent, log_price, log_price.square()), dim=-1)), dim=-1)


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """The part of a network that depends on the token: evaluated for every block.

    `block_terms` is `[num_blocks, width]`; `fact_weight` `[num_known + 3, width]` takes the last action, one-hot, and
    the scalars; `output_weight` is `[num_blocks, block_size · num_actions, width]`.
    """

    hidden_weight: Tensor
    block_terms: Tensor
    fact_weight: Tensor
    output_weight: Tensor
    output_bias: Tensor
    num_actions: int

    def scores(self, block: int, hidden: Tensor, facts: Tensor) -> Tensor:
        """Returns float32 `[rows, block_size, num_actions]` from `hidden` `[rows, hidden_size]` and `facts`
        `[rows, num_known + 3]`."""
        inner = self.inner(hidden, torch.addmm(self.block_terms[block], facts, self.fact_weight))
        scores = functional.linear(inner, self.output_weight[block], self.output_bias[block])
        return scores.view(len(hidden), -1, self.num_actions)

    def inner(self, hidden: Tensor, terms: Tensor) -> Tensor:
        """Returns the inner features, `[..., width]`."""
        state = hidden.float()
        # Normalising the product instead of the state: one small vector instead of a large one.
        scale = state.shape[-1] ** 0.5 / torch.linalg.vector_norm(state, dim=-1, keepdim=True).clamp_min(1e-12)
        return functional.silu(torch.addcmul(terms, functional.linear(state, self.hidden_weight), scale))
