"""Measures how far last-layer outputs are from full depth, and the divergence's first and second derivatives there.

Knows logits; knows no layers and no policies.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dash_runtime.errors import DashRuntimeError
from dash_runtime.training.dense_decoder import DenseDecoder

_LOGIT_ROWS = 112
"""Logits of more rows than this exist only in parts: a vocabulary is large."""
_NORMALS = 1 << 22


class TrainingDiverged(DashRuntimeError):
    """A loss is not a number; the last checkpoint is intact."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The divergence of each row, and vectors in the space of the row's last-layer output, `[rows, hidden_size]`.

    `divergence` is KL(full depth ‖ ours) in nats, float32 `[rows]`, and `slope` its gradient. `curvature` is a random
    vector with mean zero: the mean of its outer product is the divergence's second derivative. (The gradient of a drawn
    token's log probability would do too, but where the model is sure, the rare tokens that matter are hardly drawn.)
    """

    divergence: Tensor
    slope: Tensor
    curvature: Tensor


def divergences(decoder: DenseDecoder, full: Tensor, ours: Tensor) -> Tensor:
    """Returns the divergence of each row, float32 `[rows]`, of last-layer outputs `[rows, hidden_size]`."""
    parts = zip(full.split(_LOGIT_ROWS), ours.split(_LOGIT_ROWS), strict=True)
    with torch.no_grad():
        return torch.cat([_divergence(decoder.logits(own[0]), decoder.logits(own[1]))[0] for own in parts])


def judge(decoder: DenseDecoder, full: Tensor, ours: Tensor, generator: torch.Generator) -> Judged:
    """Judges last-layer outputs, `[rows, hidden_size]`; `generator` draws `Judged.curvature`."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for reference, rows in zip(full.split(_LOGIT_ROWS), ours.detach().split(_LOGIT_ROWS), strict=True):
        with torch.no_grad():
            reference_logits = decoder.logits(reference)
        with torch.enable_grad():
            leaf = rows.clone().requires_grad_()
            logits = decoder.logits(leaf)
        curvature = _drawn_curvature(torch.softmax(logits.detach(), dim=-1), generator)
        divergence, expected, own = _divergence(reference_logits, logits.detach())
        (slope,) = torch.autograd.grad(logits, leaf, own.sub_(expected), retain_graph=True)
        parts.append((divergence, slope, *torch.autograd.grad(logits, leaf, curvature)))
    return Judged(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _drawn_curvature(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Returns draws whose outer product is, in the mean, the divergence's second derivative by the logits, diag(p) −
    p·pᵀ: √p · ξ less its mean, with normal ξ."""
    size = probabilities.shape[1]
    normals = _normals(size)
    starts = torch.randint(len(normals) - size + 1, (len(probabilities),), generator=generator).tolist()
    drawn = torch.stack([normals[start : start + size] for start in starts]).to(probabilities.device)
    drawn *= probabilities.sqrt()
    return drawn.sub_(probabilities * drawn.sum(-1, keepdim=True))


@lru_cache(maxsize=1)
def _normals(size: int) -> Tensor:
    """Returns normal numbers, of which rows take `size` from different places on: drawing as many for every row would
    take longer than its logits."""
    return torch.randn(max(_NORMALS, 64 * size), generator=torch.Generator().manual_seed(0))


def _divergence(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns KL(reference ‖ ours) by row, and both distributions. Overwrites the logits."""
    reference_norm, own_norm = (own.logsumexp(-1, keepdim=True) for own in (reference, logits))
    expected = (reference - reference_norm).exp_()
    divergence = torch.linalg.vecdot(expected, reference.sub_(logits)) + (own_norm - reference_norm).squeeze(-1)
    return divergence, expected, logits.sub_(own_norm).exp_()
