"""Keys and values of prompts, kept for later prompts that begin with the same tokens.

A prompt is kept in blocks of a fixed number of tokens, each under a digest of its own tokens, of all that come before
them, and of the namespace: so a beginning that many prompts share is there once, and only a prompt that has the same
tokens from the first on, in the same namespace, finds it. Knows token ids and sequence caches; knows no requests.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from itertools import takewhile

from torch import Tensor

from dash_runtime.layers.kv_cache import SequenceCache


class PrefixCache:
    """Up to `max_tokens` prompt tokens' keys and values, in blocks of `block_tokens`; those unused longest go first.

    What is in here are copies: it neither keeps a sequence's memory alive nor takes from what sequences may reserve.
    """

    def __init__(self, max_tokens: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._max_blocks = max_tokens // block_tokens
        # The one used last comes last, and a block before the one that it follows: without the earlier one it could
        # not be found, so it has to go first.
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        """Prompt tokens whose keys and values are kept."""
        return len(self._blocks) * self._block_tokens

    def copy_into(self, namespace: str, prompt_token_ids: Sequence[int], cache: SequenceCache) -> int:
        """Fills an empty cache with the longest beginning of the prompt that is kept; returns its number of tokens.

        The prompt's last token is never among them: somebody has to compute the logits that follow it.
        """
        assert cache.length == 0
        digests = self._digests(namespace, prompt_token_ids[:-1])
        found = list(takewhile(self._blocks.__contains__, digests))
        for digest in found:
            cache.append(self._blocks[digest])
        self._touch(found)
        return cache.length

    def store(self, namespace: str, prompt_token_ids: Sequence[int], cache: SequenceCache) -> None:
        """Keeps a copy of the prompt's whole blocks, as far as there is room, once `cache` has all of the prompt."""
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
        """One for each whole block of these tokens, from the first on; no more than there is room for."""
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
