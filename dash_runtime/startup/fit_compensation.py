"""Fits the lower rungs of the compensation ladder in closed form, from one full-depth pass over some text.

Weighted least squares per layer: each token counts by the inverse of its own power. A few tokens, above all the first
of a sequence, have states hundreds of times larger and would decide the fit alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_path
from dash_runtime.layers.compensation import Affine, Scale

NUM_SEQUENCES = 8
SEQUENCE_LENGTH = 256
_NUM_SINK_TOKENS = 1
"""Positions left out at the start of each sequence: they are never decoded, and are unlike all others."""


@dataclass(frozen=True, slots=True)
class FittedCompensation:
    """The fitted rungs, in the decoder's dtype and on its device."""

    scale: Scale
    affine: Affine


@torch.inference_mode()
def fit_compensation(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> FittedCompensation:
    """Fits `scale` and `affine` of every layer to the states that full depth visits."""
    shape = (decoder.num_layers, decoder.config.hidden_size)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("x", "y", "xx", "xy")}
    total_weight = torch.zeros(decoder.num_layers, 1, dtype=torch.float64)
    for token_ids in sequences:
        for layer, (inputs, outputs) in enumerate(pairwise(full_path(decoder, [token_ids]))):
            x, y = (states[_NUM_SINK_TOKENS:].double().cpu() for states in (inputs, outputs))
            weight = 1 / x.square().mean(dim=-1, keepdim=True).clamp_min(1e-12)  # [tokens, 1]
            total_weight[layer] += weight.sum()
            sums["x"][layer] += (weight * x).sum(0)
            sums["y"][layer] += (weight * y).sum(0)
            sums["xx"][layer] += (weight * x * x).sum(0)
            sums["xy"][layer] += (weight * x * y).sum(0)
    scale = sums["xy"].sum(-1) / sums["xx"].sum(-1).clamp_min(1e-12)
    mean_x, mean_y = sums["x"] / total_weight, sums["y"] / total_weight
    variance = (sums["xx"] / total_weight - mean_x.square()).clamp_min(1e-12)
    covariance = sums["xy"] / total_weight - mean_x * mean_y
    factors = covariance / variance
    offsets = mean_y - factors * mean_x

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(decoder.device, decoder.dtype)

    return FittedCompensation(Scale(cast(scale)), Affine(cast(factors), cast(offsets)))
