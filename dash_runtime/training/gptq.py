"""Rounds a matrix to four bits or three so that its outputs change little for the inputs that it gets (GPTQ, Frantar
et al. 2023).

Each input's weights are rounded in turn, the loudest input's first, and the inputs that are left take over what that
changed. Knows matrices; knows no layers and no text.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dash_runtime.linears.grouped_matrix import GROUP_SIZE, GroupedMatrix, quantize_grouped

_DAMPING = 0.3
"""The addition to each input's second moment, as a share of their mean. With less, the rounding fits the text that the
moments are of too closely."""
_BLOCK = 128
"""Inputs that are rounded before the inputs behind them take over what is left."""


def quantize_for(weight: Tensor, bits: int, moments: Tensor) -> GroupedMatrix:
    """Rounds `[out, in]` on the grids of `quantize_grouped`.

    Args:
        weight: the matrix.
        bits: of a weight.
        moments: the sum of the inputs' outer products, float32 `[in, in]`, not all zero.
    """
    nearest = quantize_grouped(weight, bits)
    middle, most = nearest.zero_point, 2**bits - 1
    order = moments.diag().argsort(descending=True)
    groups = order // GROUP_SIZE
    # An input's weights lie together: they are rounded together.
    scales, zeros = (grid.T[groups] for grid in nearest.grids())
    left = weight.float().T[order]
    values = torch.empty_like(nearest.values.T)
    factor = _inverse_factor(moments[order][:, order])
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = torch.empty_like(left[start:end])
        for place in range(start, end):
            own, scale, zero = left[place], scales[place], zeros[place]
            rounded = ((own - zero) / scale + middle).round_().clamp_(0, most)
            values[order[place]] = rounded.to(torch.uint8)
            change = own - ((rounded - middle) * scale + zero)
            errors[place - start] = change.div_(factor[place, place])
            left[place + 1 : end].addr_(factor[place, place + 1 : end], errors[place - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return replace(nearest, values=values.T.contiguous())


def _inverse_factor(moments: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the damped inverse: row by row, how the inputs that are left take over."""
    damped = moments.clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
