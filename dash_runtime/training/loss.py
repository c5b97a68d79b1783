"""How far last-layer outputs are from full depth: the loss of each token, with and without a gradient.

Knows logits; knows no layers and no policies.
"""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from dash_runtime.errors import DashRuntimeError
from dash_runtime.training.dense_decoder import DenseDecoder

_LOGIT_ROWS = 128


class TrainingDiverged(DashRuntimeError):
    """A loss is not a number; the last checkpoint is intact."""


class Objective(StrEnum):
    """The loss of a token that leaves full depth: its divergence, or, for a drafter, the probability that full depth
    rejects it."""

    DIVERGENCE = "divergence"
    ACCEPTANCE = "acceptance"


class Loss:
    """The loss of paths of the same tokens. Full depth's probabilities are computed once.

    `full` is full depth's last-layer output, `[batch, decided, hidden_size]`.
    """

    @torch.no_grad()
    def __init__(self, decoder: DenseDecoder, full: Tensor, objective: Objective) -> None:
        self._decoder = decoder
        self._objective = objective
        self._shape = full.shape[:2]
        self._probabilities: list[Tensor] = []
        self._entropies: list[Tensor] = []
        for rows in full.flatten(0, 1).split(_LOGIT_ROWS):
            log_probs = torch.log_softmax(decoder.logits(rows), dim=-1)
            self._probabilities.append(log_probs.exp())
            self._entropies.append(-torch.linalg.vecdot(self._probabilities[-1], log_probs))

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns float32 `[batch, decided]` for last-layer outputs `[batch, decided, hidden_size]`."""
        losses = []
        parts = hidden.flatten(0, 1).split(_LOGIT_ROWS)
        for probabilities, entropy, rows in zip(self._probabilities, self._entropies, parts, strict=True):
            logits = self._decoder.logits(rows)
            if self._objective is Objective.ACCEPTANCE:
                losses.append(1 - torch.minimum(probabilities, logits.softmax(-1)).sum(-1))
            else:  # Σ p · (log p − log q), without a table of log q
                losses.append(logits.logsumexp(-1) - torch.linalg.vecdot(probabilities, logits) - entropy)
        return torch.cat(losses).view(self._shape)


def row_divergences(decoder: DenseDecoder, full: Tensor, ours: Tensor) -> Tensor:
    """Returns KL(full-depth distribution ‖ ours) in nats for each row, float32 `[rows]`, differentiable in `ours`.

    Both inputs are last-layer outputs, `[rows, hidden_size]`. Logits exist for only a few rows at a time, in the
    backward pass too.
    """
    divergence: Tensor = _RowDivergences.apply(ours, full, decoder)
    return divergence


class _RowDivergences(torch.autograd.Function):
    """Computes divergences and, in the same pass, their slopes: each depends on the state of its own row alone."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, full: Tensor, decoder: DenseDecoder) -> Tensor:
        divergences, slopes = [], []
        for reference_rows, rows in zip(full.split(_LOGIT_ROWS), ours.split(_LOGIT_ROWS), strict=True):
            reference = torch.log_softmax(decoder.logits(reference_rows), dim=-1)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = rows.detach().requires_grad_(ctx.needs_input_grad[0])
                adaptive = torch.log_softmax(decoder.logits(leaf), dim=-1)
                own = (reference.exp() * (reference - adaptive)).sum(dim=-1)
                if ctx.needs_input_grad[0]:
                    slopes.append(torch.autograd.grad(own.sum(), leaf)[0])
            divergences.append(own.detach())
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(divergences)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0].unsqueeze(-1).to(slopes.dtype), None, None
