"""Rotary position embedding (Su et al. 2021) with the scalings of longer contexts, as tables.

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
    If only a part of each head is, the channels come in another order (`channel_order`).

    longrope rotates sequences that may outgrow the original context otherwise, from their first position on, since a
    sequence's keys are rotated once. So it has a second table behind the first, and `first_row` tells them apart.
    """

    def __init__(
        self, rope: RopeConfig | None, head_dim: int, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rope = rope
        self.context_length = context_length
        positions = torch.arange(context_length, dtype=torch.float32)
        frequencies = [torch.zeros(head_dim // 2) if rope is None else inverse_frequencies(rope, head_dim)]
        if rope is not None and has_other_keys(rope, context_length):
            frequencies.append(inverse_frequencies(rope, head_dim, is_long=True))
        angles = torch.cat([torch.outer(positions, own) for own in frequencies])
        cosines, sines = angles.cos(), angles.sin()
        if rope is not None and rope.attention_factor != 1:
            factors = torch.ones(head_dim // 2)  # channels that are not rotated keep their size
            factors[: _num_rotated(rope, head_dim) // 2] = rope.attention_factor
            cosines, sines = cosines * factors, sines * factors
        self.cosines = torch.cat((cosines, cosines), dim=-1).unsqueeze(1).to(device, dtype)
        self.sines = torch.cat((-sines, sines), dim=-1).unsqueeze(1).to(device, dtype)

        self.query_factors: Tensor | None = None
        """Factors of the queries by position, `[context_length, 1, 1]`, None if all are 1."""
        if rope is not None and queries_grow(rope, context_length):
            periods = (positions / rope.original_context_length).floor()
            factors = 1 + rope.query_growth * torch.log(1 + periods)
            self.query_factors = factors.view(-1, 1, 1).to(device, dtype)

    def first_row(self, num_tokens: int) -> int:
        """Returns the row of position 0 for a sequence of up to `num_tokens`."""
        length = min(num_tokens, self.context_length)
        return self.context_length if self._rope is not None and has_other_keys(self._rope, length) else 0

    def at(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of these rows, `[rows, 1, head_dim]`."""
        return self.cosines[rows], self.sines[rows]


def rotary_tables(
    ropes: Sequence[RopeConfig | None],
    head_dim: int,
    context_length: int,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
) -> list[RotaryTable]:
    """Returns each layer's table, on its device. Layers with equal ropes on one device share one."""
    places = list(zip(ropes, devices, strict=True))
    tables = {
        (rope, device): RotaryTable(rope, head_dim, context_length, dtype, device)
        for rope, device in dict.fromkeys(places)
    }
    return [tables[place] for place in places]


def has_other_keys(rope: RopeConfig, num_tokens: int) -> bool:
    """Returns True if a sequence of up to `num_tokens` has other keys than a short one with the same tokens."""
    return rope.kind is RopeKind.LONGROPE and num_tokens > rope.original_context_length


def queries_grow(rope: RopeConfig, context_length: int) -> bool:
    """Returns True if queries in this context have factors other than 1."""
    return rope.query_growth > 0 and context_length > rope.original_context_length


def inverse_frequencies(rope: RopeConfig, head_dim: int, is_long: bool = False) -> Tensor:
    """Returns the radians per position for each pair of channels, float32 `[head_dim / 2]`.

    `is_long` tells longrope which of its factors to take. The last pairs have 0 if only a part of a head is rotated.
    """
    num_rotated = _num_rotated(rope, head_dim)
    frequencies = _inverse_frequencies(rope, num_rotated, is_long)
    if num_rotated == head_dim:
        return frequencies
    return torch.cat((frequencies, torch.zeros((head_dim - num_rotated) // 2)))


def channel_order(rope: RopeConfig, head_dim: int) -> list[int] | None:
    """Returns the order of a head's channels in which the two of a pair are half a head apart, None if they are.

    Rotating a part of a head pairs channels that are half that part apart. Queries and keys that are both reordered
    have the same products, and are then rotated as if all of the head were.
    """
    num_rotated = _num_rotated(rope, head_dim)
    if num_rotated == head_dim:
        return None
    half, middle = num_rotated // 2, (num_rotated + head_dim) // 2
    return [*range(half), *range(num_rotated, middle), *range(half, num_rotated), *range(middle, head_dim)]


def _num_rotated(rope: RopeConfig, head_dim: int) -> int:
    return head_dim if rope.num_rotated is None else rope.num_rotated


def _inverse_frequencies(rope: RopeConfig, num_rotated: int, is_long: bool) -> Tensor:
    powers = rope.theta ** (torch.arange(0, num_rotated, 2, dtype=torch.float32) / num_rotated)
    match rope.kind:
        case RopeKind.DEFAULT:
            return 1.0 / powers
        case RopeKind.LINEAR:
            return 1.0 / powers / rope.factor
        case RopeKind.LLAMA3:
            return _llama3(rope, 1.0 / powers)
        case RopeKind.YARN:
            return _yarn(rope, powers)
        case RopeKind.LONGROPE:
            return 1.0 / (torch.tensor(rope.long_factors if is_long else rope.short_factors) * powers)


def _yarn(rope: RopeConfig, powers: Tensor) -> Tensor:
    """Source: section 3.2 of YaRN (Peng et al. 2023). Channels between two numbers of turns are blended."""
    dim = 2 * len(powers)

    def channel(num_turns: float) -> float:
        """Returns the channel that makes so many turns in the original context."""
        ratio = rope.original_context_length / (num_turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low = max(math.floor(channel(rope.beta_fast)), 0)
    high: float = min(math.ceil(channel(rope.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # as in the reference, where it avoids a division by zero
    scaled_share = ((torch.arange(len(powers), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return scaled_share / (rope.factor * powers) + (1 - scaled_share) / powers


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Source: `apply_scaling` in Llama 3.1's released code. Wavelengths beyond the original context are stretched by
    `factor`, short ones are kept, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_context_length / wavelengths
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates `[rows, num_heads, head_dim]` by each row's `[rows, 1, head_dim]` table entries."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cosines, swapped, sines)
