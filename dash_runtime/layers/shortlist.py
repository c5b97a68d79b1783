"""The language-model head in INT4: rough logits for all tokens, and those of the likeliest again from an exact matrix.

`native/shortlist.h` has the same for a few rows. Here it is for many, to judge plans by. Knows matrices; knows no
plans.
"""

import torch
from torch import Tensor

from dash_runtime.layers.heads import Head
from dash_runtime.layers.mlp import GatedMlp
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import Linear
from dash_runtime.linears.grouped_matrix import GROUP_SIZE, LANES, quantize_int4_with_rest
from dash_runtime.linears.quantization import GroupedLinear, for_many_rows

NUM_EXACT_TILES = 32
"""Tiles of a row's logits that are computed again, of `LANES` tokens each. The 32 likeliest tokens are among them."""


def loudest_channels(last_layer: LayerWeights, final_norm: RmsNorm) -> Tensor:
    """Returns the channels, int64 `[32]`, in which a head's inputs are probably the largest. Most of the error of an
    INT4 matrix comes from there.

    The squares of the weights that write to a channel, times those of the norms behind it, tell nearly as well as
    measured states.
    """
    norms, mlp = (final_norm, last_layer.mlp_output_norm), last_layer.linears.mlp
    weights = [norm.weight for norm in norms if isinstance(norm, RmsNorm)]
    loudness = torch.stack([weight.float().square() for weight in weights]).prod(dim=0)
    if isinstance(mlp, GatedMlp):
        loudness *= mlp.down.weight.float().square().sum(dim=1)
    return loudness.topk(min(GROUP_SIZE, len(loudness))).indices


def shortlist_head(rough: Head, exact: Linear, final_norm: RmsNorm, multiplier: float) -> Head:
    """Returns the head in INT4 of the matrix that `exact` has in FULL, and `rough` as `int4_logits`; its logits are
    multiplied by `multiplier`. Native code has to have room for such a matrix (`is_packable`)."""

    def head(hidden: Tensor) -> Tensor:
        normed = final_norm(hidden)
        return with_exact_tiles(rough(normed), exact, normed) * multiplier

    return head


def int4_logits(weight: Tensor, loudest: Tensor) -> Head:
    """Returns what makes logits of normed states by the matrix in INT4, which has the loudest channels twice."""
    rough = for_many_rows(GroupedLinear.of(quantize_int4_with_rest(weight, loudest), weight.dtype))
    return lambda normed: rough(torch.cat((normed, normed[:, loudest]), dim=1)).float()


def with_exact_tiles(logits: Tensor, exact: Linear, normed: Tensor) -> Tensor:
    """Returns the logits with those of each row's tiles that have the largest from the exact matrix."""
    tiles = logits.unflatten(1, (-1, LANES))
    num_tiles = min(NUM_EXACT_TILES, tiles.shape[1])
    chosen = tiles.amax(dim=-1).topk(num_tiles).indices.unsqueeze(-1).expand(-1, -1, LANES)
    again = exact(normed).float().unflatten(1, (-1, LANES)).gather(1, chosen)
    return tiles.scatter(1, chosen, again).flatten(1)
