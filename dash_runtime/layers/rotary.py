"""Rotary position embedding (Su et al. 2021) with the scaling of Llama 3.1, as tables.

Knows positions and head dimensions; knows no layers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dash_runtime.model_config import RopeConfig, RopeKind


class RotaryTable:
    """Cosines and signed sines for every position of the context, `[context_length, 1, head_dim]`.

    The first half of a head is paired with its second half, as in Hugging Face checkpoints. The sine of the first half
    is negated here, so that rotating is one swap of the halves and two products. Without `rope` nothing is rotated.
    """

    def __init__(
        self, rope: RopeConfig | None, head_dim: int, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        positions = torch.arange(context_length, dtype=torch.float32)
        frequencies = torch.zeros(head_dim // 2) if rope is None else inverse_frequencies(rope, head_dim)
        angles = torch.outer(positions, frequencies)
        cosines, sines = angles.cos(), angles.sin()
        self.cosines = torch.cat((cosines, cosines), dim=-1).unsqueeze(1).to(device, dtype)
        self.sines = torch.cat((-sines, sines), dim=-1).unsqueeze(1).to(device, dtype)

    def at(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of these positions, `[positions, 1, head_dim]`."""
        return self.cosines[positions], self.sines[positions]


def rotary_tables(
    ropes: Sequence[RopeConfig | None], head_dim: int, context_length: int, dtype: torch.dtype, device: torch.device
) -> list[RotaryTable]:
    """Returns each layer's table. Layers with equal ropes share one."""
    tables = {rope: RotaryTable(rope, head_dim, context_length, dtype, device) for rope in dict.fromkeys(ropes)}
    return [tables[rope] for rope in ropes]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Returns the radians per position for each pair of channels, float32 `[head_dim / 2]`.

    Source of the llama3 variant: `apply_scaling` in Llama 3.1's released code. Wavelengths beyond the original context
    are stretched by `factor`, short ones are kept, those between are blended.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind is RopeKind.DEFAULT:
        return frequencies
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_context_length / wavelengths
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates `[rows, num_heads, head_dim]` by each row's `[rows, 1, head_dim]` table entries."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cosines, swapped, sines)
