"""Keys and values of all sequences, in one piece of memory for a fixed number of tokens.

When a sequence gets its slot it reserves the most that it may need (prompt and output limit), so it can never run out
half-way. Its reservation is contiguous, since gathering pieces for every layer and token costs more than it saves on a
CPU. It begins at a multiple of `BLOCK_TOKENS`, so that one program can attend for many sequences by the numbers of
their blocks. If there is room, but not in one piece, the other sequences are moved together first.
Knows no attention and no requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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
        """Positions that every layer has run or skipped. Their keys and values are written."""
        self._longest = 0
        self.place_at(start)

    def place_at(self, start: int) -> None:
        """Uses the pool's memory from token `start` on, a multiple of `BLOCK_TOKENS`. Copies nothing."""
        self.start = start
        self.memory = self.pool.memory[:, :, start : start + self.capacity]
        """`[num_layers, 2, capacity, num_kv_heads, head_dim]`: keys and values."""
        # Views made once: indexing a five-dimensional tensor for every layer and token would cost more
        # than the attention of a short sequence.
        layers = self.memory.flatten(0, 1).unbind()
        self.keys: Sequence[Tensor] = layers[::2]
        self.values: Sequence[Tensor] = layers[1::2]

    @property
    def num_written(self) -> int:
        """Positions that may have been written, now or before they were forgotten."""
        return max(self.length, self._longest)

    def until(self, end: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Returns keys and values of the positions before `end`, by layer: `[end, num_kv_heads, head_dim]` each."""
        layers = self.memory[:, :, :end].flatten(0, 1).unbind()
        return layers[::2], layers[1::2]

    def copy_of(self, start: int, end: int) -> Tensor:
        """Returns a copy of these keys and values, `[num_layers, 2, end - start, num_kv_heads, head_dim]`."""
        assert 0 <= start <= end <= self.length
        return self.memory[:, :, start:end].clone(memory_format=torch.contiguous_format)

    def append(self, stretch: Tensor) -> None:
        """Appends keys and values that `copy_of` returned, as the next positions."""
        end = self.length + stretch.shape[2]
        self.check_room(end)
        self.memory[:, :, self.length : end] = stretch
        self.length = end

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        assert 0 <= length <= self.length
        self._longest = self.num_written
        self.length = length

    def check_room(self, num_tokens: int) -> None:
        """Asserts that `num_tokens` positions in all are reserved."""
        assert num_tokens <= self.reserved_tokens, "a sequence outgrew its reservation"


class CachePool:
    """Hands out sequence caches until `total_tokens` are reserved.

    All memory is allocated at the start, but only as addresses: on a CPU a page takes room once it is written. Memory
    that no sequence holds, or that its sequence has not written yet, is zeros. That matters, since blocks are read
    whole: positions that a row does not attend to get weight 0, and 0 times NaN would be NaN.

    Args:
        max_sequences: the most that may be reserved at a time; each begins with a block of its own.
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
        self._caches: list[SequenceCache] = []  # in ascending order of `start`

    def reserve(self, num_tokens: int) -> SequenceCache | None:
        """Returns a cache for up to `num_tokens` positions, or None while others hold the room."""
        if self.reserved_tokens + num_tokens > self.total_tokens:
            return None
        place, start = self._find_gap(_whole_blocks(num_tokens))
        cache = SequenceCache(self, num_tokens, start)
        self._caches.insert(place, cache)
        self.reserved_tokens += num_tokens
        return cache

    def release(self, cache: SequenceCache) -> None:
        """Takes the reservation and its memory back. Does nothing if the cache is not held."""
        if cache in self._caches:
            self._caches.remove(cache)
            self.memory[:, :, cache.start : cache.start + cache.num_written].zero_()
            self.reserved_tokens -= cache.reserved_tokens

    def _find_gap(self, num_tokens: int) -> tuple[int, int]:
        """Returns the index among the caches, and the first token, of a gap of `num_tokens`; makes one if need be."""
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
                self.memory[:, :, max(start, end + num_written) : start + num_written].zero_()
                cache.place_at(end)
            end += cache.capacity
        return end


def _whole_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
