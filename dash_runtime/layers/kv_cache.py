"""Keys and values of all sequences, in one piece of memory on each device, for a fixed number of tokens.

When a sequence gets its slot it reserves the most that it may need (prompt and output limit), so it can never run out
half-way. Its reservation is contiguous, since gathering pieces for every layer and token costs more than it saves on a
CPU. It has whole blocks of `BLOCK_TOKENS`, so that what one sequence leaves fits others of about its size. If there is
room, but not in one piece, the other sequences are moved together first.

All layers of a sequence lie together: a page takes room once it is written, and a short text should write to few huge
ones, not to one for the keys and one for the values of each layer. For kernels that find rows by their places in a
layer's memory, a layer's sequences lie together instead (`by_layer`).
Knows no attention and no requests.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from dash_runtime.devices import device_of, stretches_of
from dash_runtime.model_config import ModelConfig

BLOCK_TOKENS = 16
"""Sequences begin at multiples of this many tokens, whose rounded keys and values lie together."""
LINE_BYTES = 64
"""Bytes of a cache line, which the rounded keys and values of a head begin with."""


class SequenceCache:
    """Keys and values of one sequence: `[capacity, num_kv_heads, head_dim]` per layer, views of its pool's memory."""

    def __init__(self, pool: "CachePool", reserved_tokens: int, start: int) -> None:
        self.pool = pool
        self.reserved_tokens = reserved_tokens
        self.capacity = _whole_blocks(reserved_tokens)
        self.length = 0
        """Positions that every layer has run or skipped. Their keys and values are written."""
        self._longest = 0
        self._filled: Tensor | None = None
        """By layer, the bounds of the positions that have rounded keys and values, `[layers, 2]`."""
        self.place_at(start)

    def place_at(self, start: int) -> None:
        """Uses the pool's memory from token `start` on, a multiple of `BLOCK_TOKENS`. Copies nothing."""
        self.start = start
        self.memories = self.pool.memories_at(start, self.capacity)
        """One per device, `[its layers, 2, capacity, num_kv_heads, head_dim]`: keys and values."""
        if self._filled is not None:
            self._filled.zero_()
        # Views made once: indexing a five-dimensional tensor for every layer and token would cost more
        # than the attention of a short sequence.
        layers = _unbound(self.memories)
        self.keys: Sequence[Tensor] = layers[::2]
        self.values: Sequence[Tensor] = layers[1::2]

    @property
    def rounded(self) -> tuple[Tensor, Tensor] | None:
        """The first device's memory for rounded keys and values, uint8 `[its layers, blocks, bytes]`, and by layer the
        bounds of the positions that have them, int64 `[its layers, 2]`; None for a model without. Native code keeps
        both."""
        rounded = self.pool.rounded
        if rounded is None:
            return None
        if self._filled is None:
            self._filled = torch.zeros(rounded.shape[1], 2, dtype=torch.int64)
        first, num_layers, num_bytes = self.start // BLOCK_TOKENS, *rounded.shape[1:]
        own = rounded[first : first + self.capacity // BLOCK_TOKENS].view(num_layers, -1, num_bytes)
        return own, self._filled

    @property
    def strides(self) -> tuple[int, int]:
        """Bytes of the first device's memory from layer to layer, and from keys to values."""
        layers, values, *_ = (own * self.memories[0].element_size() for own in self.memories[0].stride())
        return layers, values

    @property
    def memory(self) -> Tensor:
        """The keys and values of all layers, if these lie on one device: `[num_layers, 2, capacity, num_kv_heads,
        head_dim]`."""
        (memory,) = self.memories
        return memory

    @property
    def num_written(self) -> int:
        """Positions that may have been written, now or before they were forgotten."""
        return max(self.length, self._longest)

    def copy_of(self, start: int, end: int) -> list[Tensor]:
        """Returns a copy of these keys and values, one tensor per device, `[its layers, 2, end - start, num_kv_heads,
        head_dim]`."""
        assert 0 <= start <= end <= self.length
        return [memory[:, :, start:end].clone(memory_format=torch.contiguous_format) for memory in self.memories]

    def append(self, copied: Sequence[Tensor]) -> None:
        """Appends keys and values that `copy_of` returned, as the next positions."""
        end = self.length + copied[0].shape[2]
        self.check_room(end)
        for memory, own in zip(self.memories, copied, strict=True):
            memory[:, :, self.length : end] = own
        self.length = end

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        assert 0 <= length <= self.length
        if length == self.length:
            return
        self._longest = self.num_written
        self.length = length
        if self._filled is not None:
            self._filled[:, 1].clamp_(max=length)

    def note_written(self, length: int) -> None:
        """Takes note that so many positions may have been written, and those past its length forgotten."""
        self._longest = max(self._longest, length)

    def check_room(self, num_tokens: int) -> None:
        """Asserts that `num_tokens` positions in all are reserved."""
        assert num_tokens <= self.reserved_tokens, "a sequence outgrew its reservation"


class CachePool:
    """Hands out sequence caches until `total_tokens` are reserved.

    All memory is allocated at the start, but only as addresses: on a CPU a page takes room once it is written. Memory
    that no sequence holds, or that its sequence has not written yet, is zeros. That matters, since blocks are read
    whole: positions that a row does not attend to get weight 0, and 0 times NaN would be NaN.

    Args:
        devices: one per layer.
        max_sequences: the most that may be reserved at a time; each begins with a block of its own.
        by_layer: whether the sequences of a layer lie together, and not the layers of a sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        total_tokens: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
        max_sequences: int = 1,
        *,
        by_layer: bool = False,
    ) -> None:
        self.total_tokens = total_tokens
        self.reserved_tokens = 0
        num_tokens = pool_tokens(total_tokens, max_sequences)
        self._room = num_tokens - BLOCK_TOKENS
        self.spare_token = self._room
        """The first token of a block that no sequence gets: rows that only fill a batch up write there."""
        self._by_layer = by_layer
        stretches, head_shape = stretches_of(devices), (config.num_kv_heads, config.head_dim)
        self.memories = [
            device_of(own.device).zeros((*self._first_sizes(len(own.layers), num_tokens), *head_shape), dtype)
            for own in stretches
        ]
        """Keys and values, one per device: `[tokens, its layers, 2, num_kv_heads, head_dim]` as it is allocated where a
        sequence's layers lie together, and `[its layers, 2, tokens, num_kv_heads, head_dim]` otherwise."""
        self._rounded_shape = num_tokens // BLOCK_TOKENS, len(stretches[0].layers), rounded_block_bytes(config)
        self.token_bytes = config.num_kv_heads * config.head_dim * dtype.itemsize
        """From token to token of a layer's keys, or of its values."""
        self._caches: list[SequenceCache] = []  # in ascending order of `start`
        self.num_moves = 0
        """The number of times that caches were moved: their addresses hold until the next time."""

    @cached_property
    def rounded(self) -> Tensor | None:
        """The first device's memory for keys and values that native code rounds: uint8 `[tokens / BLOCK_TOKENS, its
        layers, bytes]`. Allocated as `memories` are; of a sequence, a layer's blocks lie together."""
        if not self._rounded_shape[-1]:
            return None
        return device_of(self.memories[0].device).zeros(self._rounded_shape, torch.uint8)

    @cached_property
    def layers(self) -> Sequence[tuple[Tensor, Tensor]]:
        """By layer, the keys and values of all tokens, if they lie together: `[tokens, num_kv_heads, head_dim]`
        each."""
        assert self._by_layer
        each = _unbound(self.memories)
        return list(zip(each[::2], each[1::2], strict=True))

    def memories_at(self, start: int, num_tokens: int) -> list[Tensor]:
        """Returns the memory of a sequence, one tensor per device, `[its layers, 2, num_tokens, num_kv_heads,
        head_dim]`."""
        if self._by_layer:
            return [memory[:, :, start : start + num_tokens] for memory in self.memories]
        shape = self.memories[0].shape[-2:]
        return [own[start : start + num_tokens].view(own.shape[1], 2, num_tokens, *shape) for own in self.memories]

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
            for memory in cache.memories:
                memory[:, :, : cache.num_written].zero_()
            self.reserved_tokens -= cache.reserved_tokens

    def _find_gap(self, num_tokens: int) -> tuple[int, int]:
        """Returns the index among the caches, and the first token, of a gap of `num_tokens`; makes one if need be."""
        end = 0
        for place, cache in enumerate(self._caches):
            if cache.start - end >= num_tokens:
                return place, end
            end = cache.start + cache.capacity
        if end + num_tokens > self._room:
            end = self._move_together()
        assert end + num_tokens <= self._room, "more sequences than the pool was made for"
        return len(self._caches), end

    def _move_together(self) -> int:
        """Closes the gaps between the caches; returns where the last one ends."""
        end = 0
        self.num_moves += 1
        for cache in self._caches:
            if cache.start > end:
                before = [memory[:, :, : cache.num_written] for memory in cache.memories]
                written = [memory.clone() for memory in before]
                for memory in before:
                    memory.zero_()
                cache.place_at(end)
                for memory, own in zip(cache.memories, written, strict=True):
                    memory[:, :, : cache.num_written] = own
            end += cache.capacity
        return end

    def _first_sizes(self, num_layers: int, num_tokens: int) -> tuple[int, int, int]:
        return (num_layers, 2, num_tokens) if self._by_layer else (num_tokens, num_layers, 2)


def pool_tokens(total_tokens: int, max_sequences: int) -> int:
    """Returns the positions that a pool has memory for, its spare block included."""
    return _whole_blocks(total_tokens) + (max_sequences + 1) * BLOCK_TOKENS


def rounded_block_bytes(config: ModelConfig) -> int:
    """Returns the bytes of a layer's rounded keys and values of `BLOCK_TOKENS` positions. A head has its bytes, their
    scales, and the first key in bf16, on cache lines of its own. A model with biases of keys has none: they are what
    its keys mostly are, and rounding loses more there."""
    if config.block.has_qkv_bias:
        return 0
    head_bytes = 2 * (BLOCK_TOKENS * (config.head_dim + 4) + config.head_dim)
    return config.num_kv_heads * -(-head_bytes // LINE_BYTES) * LINE_BYTES


def _unbound(memories: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns each layer's keys, then its values, in the order of layers. `memories` is `[layers, 2, …]` by device."""
    return tuple(chain.from_iterable(memory.flatten(0, 1).unbind() for memory in memories))


def _whole_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
