"""Keys and values of all sequences, in one stretch of memory for a number of tokens.

A sequence reserves what it may need at most (prompt and output limit) when it gets its slot, so that it can never run
out half-way. What it reserves is contiguous by token, since gathering it for every layer and token costs more than it
saves on a CPU, and begins at a multiple of `BLOCK_TOKENS`, so that one program can attend for many sequences by the
numbers of their blocks. Where the room is there but not in one piece, the others are moved together first.
Knows no attention and no requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_runtime.decoder.pending_kv import PendingKv
from dash_runtime.devices import device_of
from dash_runtime.model_config import ModelConfig
from dash_runtime.programs.kv_blocks import BLOCK_TOKENS


class SequenceCache:
    """Keys and values of one sequence: `[capacity, num_kv_heads, head_dim]` per layer, views of its pool's memory."""

    def __init__(self, pool: "CachePool", reserved_tokens: int, start: int) -> None:
        self.pool = pool
        self.reserved_tokens = reserved_tokens
        self.capacity = _whole_blocks(reserved_tokens)
        self.length = 0
        """Positions that every layer has seen, and written or kept pending."""
        self.pending = PendingKv(len(pool.memory))
        """Ends at `length`."""
        self._longest = 0
        self.place_at(start)

    def place_at(self, start: int) -> None:
        """Makes its memory that from the pool's token `start` on, a multiple of `BLOCK_TOKENS`."""
        self.start = start
        self._memory = self.pool.memory[:, :, start : start + self.capacity]
        # Views made once: indexing a five-dimensional tensor for every layer and token would cost more
        # than the attention of a short sequence.
        layers = self._memory.flatten(0, 1).unbind()
        self.keys: Sequence[Tensor] = layers[::2]
        self.values: Sequence[Tensor] = layers[1::2]

    @property
    def num_written(self) -> int:
        """Positions that may have been written, now or before they were forgotten."""
        return max(self.length, self._longest)

    def until(self, end: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of the positions before `end`, by layer: `[end, num_kv_heads, head_dim]` each."""
        layers = self._memory[:, :, :end].flatten(0, 1).unbind()
        return layers[::2], layers[1::2]

    def copy_of(self, start: int, end: int) -> Tensor:
        """Keys and values of these positions, `[num_layers, 2, end - start, num_kv_heads, head_dim]`, in memory of
        their own; every layer must have written them."""
        assert 0 <= start <= end <= self.length
        assert not any(self.pending)
        return self._memory[:, :, start:end].clone(memory_format=torch.contiguous_format)

    def append(self, stretch: Tensor) -> None:
        """Takes the keys and values of the next positions from what `copy_of` returned."""
        assert not any(self.pending)
        end = self.length + stretch.shape[2]
        self.check_room(end)
        self._memory[:, :, self.length : end] = stretch
        self.length = end

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        assert 0 <= length <= self.length
        self.pending.forget(self.length - length)
        self._longest = self.num_written
        self.length = length

    def check_room(self, num_tokens: int) -> None:
        """Fails where so many positions in all are more than were reserved."""
        assert num_tokens <= self.reserved_tokens, "a sequence outgrew its reservation"


class CachePool:
    """Hands out sequence caches until `total_tokens` are reserved.

    Memory is there for all of them from the start, as addresses: on a CPU a page takes room once it is written.
    What no sequence holds is zeros, as is what a sequence has not written yet: blocks are read whole, with weight 0
    where there is nothing to attend to, and 0 times what is not a number would be no number.

    Args:
        max_sequences: so many may be reserved at a time, each beginning with a block of its own.
    """

    def __init__(
        self, config: ModelConfig, total_tokens: int, dtype: torch.dtype, device: torch.device, max_sequences: int = 1
    ) -> None:
        self.total_tokens = total_tokens
        self.reserved_tokens = 0
        room = _whole_blocks(total_tokens) + max_sequences * BLOCK_TOKENS
        shape = (config.num_layers, 2, room, config.num_kv_heads, config.head_dim)
        self.memory = device_of(device).zeros(shape, dtype)
        """`[num_layers, 2, tokens, num_kv_heads, head_dim]`: keys and values."""
        blocks = self.memory.view(*shape[:2], -1, BLOCK_TOKENS, *shape[3:])
        self.key_blocks: Sequence[Tensor] = blocks[:, 0].unbind()
        """Per layer, `[blocks, BLOCK_TOKENS, num_kv_heads, head_dim]`."""
        self.value_blocks: Sequence[Tensor] = blocks[:, 1].unbind()
        self._caches: list[SequenceCache] = []  # in the order of their places

    def reserve(self, num_tokens: int) -> SequenceCache | None:
        """A cache for up to `num_tokens` positions, or None while others hold the room."""
        if self.reserved_tokens + num_tokens > self.total_tokens:
            return None
        place, start = self._find_gap(_whole_blocks(num_tokens))
        cache = SequenceCache(self, num_tokens, start)
        self._caches.insert(place, cache)
        self.reserved_tokens += num_tokens
        return cache

    def release(self, cache: SequenceCache) -> None:
        """Takes the reservation back, and the memory with it; one that is not held is left alone."""
        if cache in self._caches:
            self._caches.remove(cache)
            self._clear(cache.start, cache.start + cache.num_written)
            self.reserved_tokens -= cache.reserved_tokens

    def _find_gap(self, num_tokens: int) -> tuple[int, int]:
        """Where among the caches, and at which token, there is room for so many; makes it where it is in pieces."""
        end = 0
        for place, cache in enumerate(self._caches):
            if cache.start - end >= num_tokens:
                return place, end
            end = cache.start + cache.capacity
        if end + num_tokens > self.memory.shape[2]:
            end = self._move_together()
        assert end + num_tokens <= self.memory.shape[2], "more sequences than the pool was made for"
        return len(self._caches), end

    def _move_together(self) -> int:
        """Closes the gaps between the caches; returns where the last one ends."""
        end = 0
        for cache in self._caches:
            start, num_written = cache.start, cache.num_written
            if start > end:
                self.memory[:, :, end : end + num_written] = self.memory[:, :, start : start + num_written].clone()
                self._clear(max(start, end + num_written), start + num_written)
                cache.place_at(end)
            end += cache.capacity
        return end

    def _clear(self, start: int, end: int) -> None:
        self.memory[:, :, start:end].zero_()


def _whole_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
