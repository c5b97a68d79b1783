"""Which calls for several rows of a sequence give each the very numbers that it has alone: tried on this machine.

A C++ compiler may sum the same product in another order where there are more rows, and does on some processors. Knows
the decoder; knows no sequences.
"""

from collections.abc import Collection

import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.compensation import Identity
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.kv_cache import SequenceCache

# Sums in another order mostly round to the same numbers in bf16, but hardly for so many calls.
_NUM_CALLS = 150


@torch.inference_mode()
def unequal_strides(decoder: Decoder, strides: Collection[int]) -> set[int]:
    """Those of `strides` whose rows have other numbers than the same rows one by one, in the first layer."""
    return {stride for stride in strides if stride > 1 and not _is_equal(decoder, stride)}


def _is_equal(decoder: Decoder, stride: int) -> bool:
    num_tokens = min(1 + _NUM_CALLS * stride, decoder.context_length)
    alone, together = decoder.caches([num_tokens] * 2)
    for cache in (alone, together):
        _first_layer(decoder, cache, [0])
    for first in range(1, num_tokens - stride + 1, stride):
        token_ids = [token_id % decoder.config.vocab_size for token_id in range(first, first + stride)]
        rows = torch.cat([_first_layer(decoder, alone, [token_id]) for token_id in token_ids])
        if not torch.equal(rows, _first_layer(decoder, together, token_ids)):
            return False
    return True


def _first_layer(decoder: Decoder, cache: SequenceCache, token_ids: list[int]) -> torch.Tensor:
    batch = decoder.rows([cache], [len(token_ids)], [Identity()], as_decoding=True)
    hidden = decoder.run_layer(0, (Action.FULL,) * len(token_ids), decoder.embed(token_ids), batch)
    batch.commit()
    return hidden
