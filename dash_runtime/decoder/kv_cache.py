"""Keys and values of all sequences, within one number of tokens.

A sequence reserves what it may need at most (prompt and output limit) when it gets its slot, so that
it can never run out half-way; memory is allocated as it grows. Each sequence's keys are contiguous by
token, since gathering blocks for every layer and token costs more than it saves on a CPU: what is written so far is
one contiguous stretch, whatever the room behind it. Knows no attention and no requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_runtime.model_config import ModelConfig

_MIN_GROWTH_TOKENS = 64


class SequenceCache:
    """Keys and values of one sequence: `[capacity, num_kv_heads, head_dim]` per layer."""

    def __init__(self, config: ModelConfig, reserved_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.reserved_tokens = reserved_tokens
        self.length = 0
        """Positions that every layer has seen, and written or kept pending."""
        self.pending: list[list[Tensor]] = [[] for _ in range(config.num_layers)]
        """Per layer, the inputs `[1, hidden_size]` of the latest positions where it was skipped, whose keys and values
        are still to be projected (`rows.py`); they end at `length`."""
        self._layers = (config.num_layers, 2)
        self._token = (config.num_kv_heads, config.head_dim)
        self._buffer = torch.empty((*self._layers, 0, *self._token), dtype=dtype, device=device)
        self._split()

    @property
    def capacity(self) -> int:
        """Positions that memory is allocated for."""
        return self._buffer.shape[2]

    def grow(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` positions in all, keeping what is written.

        Grows by half its size at least, so that copying costs a constant share per token.
        """
        if num_tokens <= self.capacity:
            return
        assert num_tokens <= self.reserved_tokens, "a sequence outgrew its reservation"
        growth = max(_MIN_GROWTH_TOKENS, self.capacity // 2)
        capacity = min(self.reserved_tokens, max(num_tokens, self.capacity + growth))
        # Zeros: a pass of several rows reads, with weight 0, positions whose values are still pending.
        larger = self._buffer.new_zeros((*self._layers, capacity, *self._token))
        larger[:, :, : self.length] = self._buffer[:, :, : self.length]
        self._buffer = larger
        self._split()

    def until(self, end: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of the positions before `end`, by layer: `[end, num_kv_heads, head_dim]` each."""
        layers = self._buffer.flatten(0, 1)[:, :end].unbind()
        return layers[::2], layers[1::2]

    def copy_of(self, start: int, end: int) -> Tensor:
        """Keys and values of these positions, `[num_layers, 2, end - start, num_kv_heads, head_dim]`, in memory of
        their own; every layer must have written them."""
        assert 0 <= start <= end <= self.length
        assert not any(self.pending)
        return self._buffer[:, :, start:end].clone(memory_format=torch.contiguous_format)

    def append(self, stretch: Tensor) -> None:
        """Takes the keys and values of the next positions from what `copy_of` returned."""
        assert not any(self.pending)
        end = self.length + stretch.shape[2]
        self.grow(end)
        self._buffer[:, :, self.length : end] = stretch
        self.length = end

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        assert 0 <= length <= self.length
        for layer, rows in enumerate(self.pending):
            if rows:
                self.pending[layer] = rows[: max(0, len(rows) - (self.length - length))]
        self.length = length

    def _split(self) -> None:
        # Views made once: indexing a five-dimensional tensor for every layer and token would cost more
        # than the attention of a short sequence.
        self.keys: list[Tensor] = [layer[0] for layer in self._buffer]
        self.values: list[Tensor] = [layer[1] for layer in self._buffer]


class CachePool:
    """Hands out sequence caches until `total_tokens` are reserved."""

    def __init__(self, config: ModelConfig, total_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.total_tokens = total_tokens
        self.reserved_tokens = 0
        self._config = config
        self._dtype = dtype
        self._device = device

    def reserve(self, num_tokens: int) -> SequenceCache | None:
        """A cache for up to `num_tokens` positions, or None while others hold the room."""
        if self.reserved_tokens + num_tokens > self.total_tokens:
            return None
        self.reserved_tokens += num_tokens
        return SequenceCache(self._config, num_tokens, self._dtype, self._device)

    def release(self, cache: SequenceCache) -> None:
        """Takes the reservation back; the memory goes with the last reference."""
        self.reserved_tokens -= cache.reserved_tokens
        cache.reserved_tokens = 0
