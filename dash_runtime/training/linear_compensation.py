"""Fits the linear rungs of the compensation ladder by ridge regression of each layer's delta on its input.

The low-rank map is the reduced-rank regression (Izenman 1975): the dense solution projected on the main directions of
its predictions, which loses least of them at that rank. Knows states; knows no policy.
"""

import torch
from torch import Tensor

from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.compensation import Dense, LowRank

_RIDGE = 1e-2
"""Share of the mean input power that is added to the diagonal."""


class LinearFit:
    """Gathers inputs and deltas of every layer, each token weighted by the inverse of its power."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        size = decoder.config.hidden_size + 1  # a constant input stands for the offset
        self._inputs = torch.zeros(decoder.num_layers, size, size)
        self._products = torch.zeros(decoder.num_layers, size, size - 1)

    def add(self, layer: int, inputs: Tensor, outputs: Tensor) -> None:
        """Adds rows of a layer: its input and output, `[rows, hidden_size]` each."""
        x, delta = inputs.float().cpu(), (outputs - inputs).float().cpu()
        weight = x.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()
        x = torch.cat((x * weight, weight), dim=-1)
        self._inputs[layer] += x.T @ x
        self._products[layer] += x.T @ (delta * weight)

    def dense(self) -> Dense:
        """Solves for a `[hidden_size, hidden_size]` map and an offset per layer."""
        solutions = torch.stack([self._solve(layer) for layer in range(self._decoder.num_layers)])
        return Dense(self._cast(solutions[:, :-1].transpose(1, 2)), self._cast(solutions[:, -1]))

    def low_rank(self, rank: int) -> LowRank:
        """Solves for a map of the given rank and an offset per layer."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in range(self._decoder.num_layers):
            solution = self._solve(layer)
            maps, offset = solution[:-1], solution[-1]
            predicted = maps.T @ self._inputs[layer, :-1, :-1] @ maps
            directions = torch.linalg.eigh(predicted).eigenvectors[:, -rank:]  # [hidden_size, rank]
            parts.append(((maps @ directions).T, directions, offset))
        down, up, offsets = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return LowRank(down, up, offsets).to(self._decoder.device)

    def _solve(self, layer: int) -> Tensor:
        gram = self._inputs[layer]
        size = len(gram)
        penalty = torch.eye(size) * _RIDGE * gram[:-1, :-1].diagonal().mean()
        penalty[-1, -1] = 1e-6 * gram[-1, -1]  # the offset is free
        return torch.linalg.solve(gram + penalty, self._products[layer])

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous().to(self._decoder.device, self._decoder.dtype)
