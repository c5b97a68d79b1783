"""Keeps keys and values of prompts for later prompts that begin with the same tokens.

A prompt is kept in KV blocks of a fixed number of tokens. Each is filed under a digest of its own tokens, all tokens
before them, and the namespace. So a beginning that many prompts share is kept once, and is found only by prompts of the
same namespace that have the same tokens from the first on. Knows token ids and sequence caches; knows no requests.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from itertools import takewhile

from torch import Tensor

from dash_runtime.layers.kv_cache import SequenceCache


class PrefixCache:
    """Keys and values of up to `max_tokens` prompt tokens, in KV blocks of `block_tokens`. The longest unused go first.

    It holds copies: it neither keeps a sequence's memory alive nor takes from the tokens that sequences may reserve.
    """

    def __init__(self, max_tokens: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._max_blocks = max_tokens // block_tokens
        # In the order of last use. A block stands before the one that precedes it in the prompt, so that it is dropped
        # first: without its predecessor it cannot be found.
        self._blocks: OrderedDict[bytes, Sequence[Tensor]] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        """Prompt tokens whose keys and values are kept."""
        return len(self._blocks) * self._block_tokens

    def copy_into(self, namespace: str, prompt_token_ids: Sequence[int], cache: SequenceCache) -> int:
        """Fills an empty cache with the longest kept beginning of the prompt; returns its number of tokens.

        The prompt's last token is never copied: it has to run, to give the first logits.
        """
        assert cache.length == 0
        digests = self._digests(namespace, prompt_token_ids[:-1])
        found = list(takewhile(self._blocks.__contains__, digests))
        for digest in found:
            cache.append(self._blocks[digest])
        self._touch(found)
        return cache.length

    def store(self, namespace: str, prompt_token_ids: Sequence[int], cache: SequenceCache) -> None:
        """Keeps a copy of the prompt's whole KV blocks, as many as fit. `cache` has to hold all of the prompt."""
        digests = self._digests(namespace, prompt_token_ids)
        num_kept = sum(1 for _ in takewhile(self._blocks.__contains__, digests))
        self._touch(digests[:num_kept])
        while self._blocks and len(self._blocks) + len(digests) - num_kept > self._max_blocks:
            self._blocks.popitem(last=False)
        for place in range(num_kept, len(digests)):
            start = place * self._block_tokens
            self._blocks[digests[place]] = cache.copy_of(start, start + self._block_tokens)
        self._touch(digests)

    def _digests(self, namespace: str, token_ids: Sequence[int]) -> list[bytes]:
        """Returns one digest per whole KV block of these tokens, from the first on; no more than fit."""
        digests: list[bytes] = []
        digest = sha256(namespace.encode()).digest()
        for place in range(min(len(token_ids) // self._block_tokens, self._max_blocks)):
            block = token_ids[place * self._block_tokens : (place + 1) * self._block_tokens]
            digest = sha256(digest + array("q", block).tobytes()).digest()
            digests.append(digest)
        return digests

    def _touch(self, digests: Sequence[bytes]) -> None:
        for digest in reversed(digests):
            self._blocks.move_to_end(digest)
