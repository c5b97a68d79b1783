"""A layer's program that also evaluates a policy on the layer's input, and so decides the next layer.

To be traced, not run eagerly. For one row, and for policies that decide one layer from the input of the one before.
Calling a program costs more than the evaluation, so it goes along with a call that is made anyway. Knows tensors only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.linears.row_kernels import TILE, FullRowMatrix, row_product
from dash_runtime.programs.traced_policy import PolicyShape, action_scores


class DecidingLayer(nn.Module):
    """A layer that runs or is skipped, and the policy's evaluation."""

    def __init__(self, layer: nn.Module, policy: PolicyShape) -> None:
        super().__init__()
        self._layer = layer
        self._policy = policy

    def forward(self, layer_inputs: tuple[Tensor, ...], evaluation: tuple[Tensor, ...]) -> Tensor:
        """Returns the layer's output. `layer_inputs` begin with its input, `[1, hidden_size]`.

        The evaluation's inputs are float32: `exchanged` with facts, priced costs and, to be written, the index of the
        best action and the scores, `[num_facts + 2 * num_actions + 1]`; the network's two matrices (`packed_matrix`),
        and what is the layer's own (`packed_terms`).
        """
        exchanged, *network = evaluation
        shape = self._policy
        facts, priced, _ = exchanged.split((shape.num_facts, shape.num_actions, 1 + shape.num_actions))
        exchanged[-1 - shape.num_actions :] = self._evaluate(layer_inputs[0], facts, priced, *network)
        output: Tensor = self._layer(*layer_inputs)
        return output

    def _evaluate(
        self, hidden: Tensor, facts: Tensor, priced: Tensor, hidden_weight: Tensor, inner_weight: Tensor, others: Tensor
    ) -> Tensor:
        shape = self._policy
        width, inner_width = padded_width(shape.width), padded_width(shape.inner_width)
        sizes = (width, shape.num_facts * width, inner_width, shape.num_actions * inner_width, shape.num_actions)
        terms, fact_weight, inner_terms, output_weight, output_bias = others.split(sizes)
        state = hidden.float()
        # Written like a norm, so that the layer's own sum of squares serves both.
        scale = torch.rsqrt(state.square().mean(-1, keepdim=True).clamp_min(1e-24 / shape.hidden_size))
        products = row_product(Action.FULL, state, (hidden_weight,))
        known = (facts.unsqueeze(1) * fact_weight.view(-1, width)).sum(0)
        features = functional.silu(terms + known + products * scale)
        inner = functional.silu(inner_terms + row_product(Action.FULL, features, (inner_weight,)))
        # One after another: the sums share a loop, and a handful of numbers needs none.
        rows = output_weight.view(-1, inner_width).unbind()
        outputs = [(inner * row).sum(-1) + bias for row, bias in zip(rows, output_bias.split(1), strict=True)]
        scores = [action_scores(*own) for own in zip(outputs, priced.split(1), strict=True)]
        best, chosen = scores[0], torch.zeros_like(scores[0])
        for index, score in enumerate(scores[1:], 1):
            chosen = torch.where(score > best, float(index), chosen)
            best = torch.maximum(score, best)
        return torch.cat([chosen, *scores])


def padded_width(width: int) -> int:
    """Returns a width of the packed network, a whole number of tiles. The added features are zeros."""
    return -(-width // TILE) * TILE


def packed_matrix(weight: Tensor) -> Tensor:
    """Returns a hidden layer's weight, which all layers of the decoder share, in tiles."""
    out_features, in_features = weight.shape
    added = padded_width(in_features) - in_features, padded_width(out_features) - out_features
    padded = functional.pad(weight, (0, added[0], 0, added[1]))
    return FullRowMatrix.pack(padded).tiles


def packed_terms(
    terms: Tensor, fact_weight: Tensor, inner_terms: Tensor, output_weight: Tensor, output_bias: Tensor
) -> Tensor:
    """Returns the tensors that are one layer's own, joined. `output_weight` is `[num_actions, inner_width]`."""
    widths = [padded_width(own.shape[-1]) - own.shape[-1] for own in (terms, fact_weight, inner_terms, output_weight)]
    padded = [
        functional.pad(own, (0, added))
        for own, added in zip((terms, fact_weight, inner_terms, output_weight), widths, strict=True)
    ]
    return torch.cat([own.flatten() for own in (*padded, output_bias)])
