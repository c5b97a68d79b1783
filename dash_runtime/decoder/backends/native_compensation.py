"""Packs compensation for native code (`native/pass_rows.py`). Knows compensations and layouts; knows no policies."""

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.layers.compensation import Affine, Compensation, Identity, PackedLowRank, Scale
from dash_runtime.linears.grouped_matrix import GROUP_SIZE
from dash_runtime.native.matrix import Int8NativeMatrix
from dash_runtime.native.pass_rows import CompensatedLayers, LowRankMap


def runs_natively(compensation: Compensation) -> bool:
    """Returns True if native code can compensate so."""
    return isinstance(compensation, Identity | Scale | Affine | PackedLowRank)


def pack_for_rows(compensation: Compensation, num_layers: int, hidden_size: int) -> CompensatedLayers | None:
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
    return CompensatedLayers(num_layers, torch.cat((factors, offsets), dim=1).to(torch.bfloat16).unbind())


def _pack_low_rank(compensation: PackedLowRank) -> CompensatedLayers:
    num_layers, rank, _ = compensation.down.shape
    missing = -rank % GROUP_SIZE  # kernels read so many inputs at a time: further features are 0

    def pack(down: Tensor, down_scales: Tensor, up: Tensor, up_scales: Tensor) -> LowRankMap:
        down, up = functional.pad(down, (0, 0, 0, missing)), functional.pad(up, (0, missing))
        narrow = Int8NativeMatrix.of(down, functional.pad(down_scales, (0, missing)))
        return LowRankMap(narrow, Int8NativeMatrix.of(up, up_scales))

    parts = compensation.down, compensation.down_scales, compensation.up, compensation.up_scales
    return CompensatedLayers(
        num_layers, compensation.offsets.unbind(), [pack(*own) for own in zip(*parts, strict=True)]
    )
