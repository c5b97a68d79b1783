"""Packs compensation for native code (`rows/model_rows.py`).

Knows compensations; knows no rows and no policies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.layers.compensation import Affine, Compensation, Identity, PackedLowRank, Scale


@dataclass(frozen=True, slots=True)
class RowCompensation:
    """A compensation as native code reads it.

    `rank` is that of a low-rank map; 0 stands for a factor and an offset per channel. `layers` has each layer's inputs.
    """

    rank: int
    layers: Sequence[Sequence[Tensor]]


def runs_natively(compensation: Compensation) -> bool:
    """Returns True if native code can compensate so."""
    return isinstance(compensation, Identity | Scale | Affine | PackedLowRank)


def pack_for_rows(compensation: Compensation, num_layers: int, hidden_size: int) -> RowCompensation | None:
    """Returns the packed form, or None if native code has none of this kind."""
    if isinstance(compensation, PackedLowRank):
        return _pack_low_rank(compensation)
    if isinstance(compensation, Identity):
        factors, offsets = torch.ones(num_layers, hidden_size), torch.zeros(num_layers, hidden_size)
    elif isinstance(compensation, Scale):
        factors = compensation.factors.unsqueeze(1).expand(num_layers, hidden_size)
        offsets = torch.zeros(num_layers, hidden_size)
    elif isinstance(compensation, Affine):
        factors, offsets = compensation.factors, compensation.offsets
    else:
        return None
    return RowCompensation(0, [(own,) for own in torch.cat((factors, offsets), dim=1).to(torch.bfloat16)])


def _pack_low_rank(compensation: PackedLowRank) -> RowCompensation:
    matrices = torch.stack((compensation.down, compensation.up.transpose(-1, -2)), dim=1)
    vectors = torch.cat((compensation.down_scales, compensation.up_scales, compensation.offsets), dim=1)
    return RowCompensation(compensation.down.shape[1], list(zip(matrices, vectors, strict=True)))
