"""The input embedding, which looks up a row of a matrix for each token. Knows one matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.devices import device_of
from dash_runtime.linears.dense_linear import Linear, packed_words

Embedding = Callable[[Sequence[int]], Tensor]
"""Maps token ids to `[tokens, hidden_size]`."""


@dataclass(frozen=True, slots=True)
class PlainEmbedding:
    """Looks up rows of `weight`, `[vocab_size, hidden_size]`, times `multiplier`."""

    weight: Tensor
    multiplier: float = 1.0

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        return self.look_up(device_of(self.weight.device).upload(torch.tensor(token_ids)))

    def look_up(self, token_ids: Tensor) -> Tensor:
        """Does the same for int64 `[tokens]` on the matrix's device."""
        rows = functional.embedding(token_ids, self.weight)
        return rows if self.multiplier == 1 else rows * self.multiplier


@dataclass(frozen=True, slots=True)
class HeadsEmbedding:
    """Looks up rows in the memory of a tied, packed head (`dense_linear.packed_words`), times `multiplier`.

    That takes some microseconds more per token than a separate matrix, which would be as large as ten INT4 layers.
    """

    words: Tensor
    multiplier: float = 1.0

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        if len(token_ids) == 1:  # decoding one sequence needs no tensors of indices
            block, place = divmod(token_ids[0], self.words.shape[2])
            rows = self.words[block, :, place].unsqueeze(0).contiguous()
        else:
            ids, block_size = torch.tensor(token_ids), self.words.shape[2]
            rows = self.words.transpose(1, 2)[ids // block_size, ids % block_size]
        embedded = rows.view(torch.bfloat16)
        return embedded if self.multiplier == 1 else embedded * self.multiplier


def make_embedding(weight: Tensor, tied_head: Linear | None, multiplier: float) -> Embedding:
    """Returns an embedding that gives the rows of `weight` times `multiplier`.

    It reads them from the memory of `tied_head`, the same matrix, if that has a known layout.
    """
    words = None if tied_head is None else packed_words(tied_head)
    return PlainEmbedding(weight, multiplier) if words is None else HeadsEmbedding(words, multiplier)
