"""A narrow head: rough logits from a few numbers of the state, those of likely tokens from all of it in INT4, and those
of the likeliest again from the exact matrix.

`native/likely.h` has the same for a few rows. Here it is for many, to judge plans by. Shim et al. 2017 (SVD-softmax)
have such a head with an orthogonal map; here the map is made for the states that a head gets (training/head_map.py).
Knows matrices; knows no plans.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.heads import Head
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.shortlist import with_exact_tiles
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.quantization import for_many_rows, make_linear

NUM_LIKELY = 8192
"""Tokens whose logits are computed from the whole state, at most."""
_MARGIN, _BIN_WIDTH = 14.0, 0.125
"""In nats, as in the native code."""


@dataclass(frozen=True, slots=True)
class HeadMap:
    """The map of a narrow head, float32.

    `narrow` `[rank, hidden_size]` makes `rank` numbers of a normed state. From them `widen` `[hidden_size, rank]` makes
    nearly the state again. `offsets` `[vocab_size]` are added to the rough logits: half the variance of what they lack.
    Without that the mean of their exponentials would be too low.
    """

    narrow: Tensor
    widen: Tensor
    offsets: Tensor

    @property
    def rank(self) -> int:
        return len(self.narrow)


@dataclass(frozen=True, slots=True)
class NarrowMatrices:
    """A head's matrix for a map: its mean row, float32 `[hidden_size]`, and `widened` `[vocab_size, rank]`, which gives
    logits less the mean row's from narrow states. The mean row's logit is part of every token's, and cheap to have."""

    mean: Tensor
    widened: FullLinear

    @classmethod
    def of(cls, weight: Tensor, widen: Tensor) -> "NarrowMatrices":
        mean = weight.mean(dim=0, dtype=torch.float32)
        own = widen.to(weight)
        return cls(mean, FullLinear(weight @ own - (mean @ widen.to(mean)).to(weight)))


def narrow_head(
    weight: Tensor, rounded: Head, exact: Linear, of: HeadMap, final_norm: RmsNorm, multiplier: float
) -> Head:
    """Returns the narrow head of the matrix `weight`, which `exact` has in FULL, and `rounded` as `int4_logits`; its
    logits are multiplied by `multiplier`."""
    matrices = NarrowMatrices.of(weight, of.widen)
    narrow = make_linear(Action.INT8, FullLinear(of.narrow.to(weight)))
    rough = for_many_rows(make_linear(Action.INT4, matrices.widened))

    def head(hidden: Tensor) -> Tensor:
        normed = final_norm(hidden)
        logits = rough(narrow(normed)).float().add_(of.offsets).add_((normed.float() @ matrices.mean).unsqueeze(1))
        likely = _likely(logits * multiplier)
        return with_exact_tiles(torch.where(likely, rounded(normed), logits), exact, normed) * multiplier

    return head


def _likely(logits: Tensor) -> Tensor:
    """Returns which tokens are computed again, bool `[rows, vocab_size]`: those of whole bins below the largest logit,
    as many as there is room for."""
    bins = ((logits.amax(dim=1, keepdim=True) - logits) / _BIN_WIDTH).int()
    last = bins.new_full((len(bins), 1), int(_MARGIN / _BIN_WIDTH))
    if logits.shape[1] > NUM_LIKELY:
        first_left_out = bins.kthvalue(NUM_LIKELY + 1, dim=1, keepdim=True).values
        last = torch.minimum(last, first_left_out)
    return bins < last
