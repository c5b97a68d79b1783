"""A layer's program that also evaluates a policy on the layer's input, and so decides the next layer.

To be traced, not run eagerly. For one row, and for policies that decide one layer from the input of the one before.
Calling a program costs more than the evaluation, so it goes along with a call that is made anyway. Knows tensors only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.linears.row_kernels import TILE, FullRowMatrix, row_product
from dash_runtime.programs.traced_policy import PolicyShape


class DecidingLayer(nn.Module):
    """A layer that runs or is skipped, and the policy's evaluation."""

    def __init__(self, layer: nn.Module, policy: PolicyShape) -> None:
        super().__init__()
        self._layer = layer
        self._policy = policy

    def forward(self, layer_inputs: tuple[Tensor, ...], evaluation: tuple[Tensor, ...]) -> Tensor:
        """Returns the layer's output. `layer_inputs` begin with its input, `[1, hidden_size]`.

        The evaluation's inputs are float32: `exchanged` with the facts and, to be written, the index of the best
        action and the scores, `[num_facts + 1 + num_actions]`; and the network
        (`packed_matrix` and `packed_terms`).
        """
        exchanged, hidden_weight, others = evaluation
        shape = self._policy
        facts = exchanged[: shape.num_facts]
        exchanged[-1 - shape.num_actions :] = self._evaluate(layer_inputs[0], facts, hidden_weight, others)
        output: Tensor = self._layer(*layer_inputs)
        return output

    def _evaluate(self, hidden: Tensor, facts: Tensor, hidden_weight: Tensor, others: Tensor) -> Tensor:
        shape = self._policy
        width = padded_width(shape.width)
        sizes = (width, shape.num_facts * width, shape.num_actions * width, shape.num_actions)
        terms, fact_weight, output_weight, output_bias = others.split(sizes)
        state = hidden.float()
        # Written like a norm, so that the layer's own sum of squares serves both.
        scale = torch.rsqrt(state.square().mean(-1, keepdim=True).clamp_min(1e-24 / shape.hidden_size))
        products = row_product(Action.FULL, state, (hidden_weight,))
        known = (facts.unsqueeze(1) * fact_weight.view(-1, width)).sum(0)
        inner = functional.silu(terms + known + products * scale)
        # One after another: the sums share a loop, and a handful of numbers needs none.
        rows = output_weight.view(-1, width).unbind()
        scores = [(inner * row).sum(-1) + bias for row, bias in zip(rows, output_bias.split(1), strict=True)]
        best, chosen = scores[0], torch.zeros_like(scores[0])
        for index, score in enumerate(scores[1:], 1):
            chosen = torch.where(score > best, float(index), chosen)
            best = torch.maximum(score, best)
        return torch.cat([chosen, *scores])


def padded_width(width: int) -> int:
    """Returns the width of the packed network, a whole number of tiles. The added features are zeros."""
    return -(-width // TILE) * TILE


def packed_matrix(hidden_weight: Tensor) -> Tensor:
    """Returns the matrix that all layers share, in tiles."""
    width = hidden_weight.shape[0]
    return FullRowMatrix.pack(functional.pad(hidden_weight, (0, 0, 0, padded_width(width) - width))).tiles


def packed_terms(terms: Tensor, fact_weight: Tensor, output_weight: Tensor, output_bias: Tensor) -> Tensor:
    """Returns the tensors of a folded network that are one layer's own, joined."""
    added = padded_width(len(terms)) - len(terms)
    padded = [functional.pad(own, (0, added)) for own in (terms, fact_weight, output_weight)]
    return torch.cat([own.flatten() for own in (*padded, output_bias)])
