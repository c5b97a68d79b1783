"""Tries which calls for several rows of a sequence give each row the same bits as alone, on this machine.

With more rows, a C++ compiler may sum the same product in another order, and does so for some processors. Knows the
decoder; knows no sequences.
"""

from collections.abc import Collection, Sequence

import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.kv_cache import SequenceCache

# Sums in another order mostly round to the same bf16, but hardly in all of this many calls.
_NUM_CALLS = 150


@torch.inference_mode()
def unequal_counts(decoder: Decoder, counts: Collection[int]) -> set[int]:
    """Returns the numbers of rows whose calls give other bits than calls for one row each, in the first layer."""
    return {count for count in counts if count > 1 and not _is_equal(decoder, count)}


def _is_equal(decoder: Decoder, count: int) -> bool:
    num_tokens = min(1 + _NUM_CALLS * count, decoder.context_length)
    alone, together = decoder.caches([num_tokens] * 2)
    for cache in (alone, together):
        _first_layer(decoder, PassKind.PREFILL, cache, [0])
    for first in range(1, num_tokens - count + 1, count):
        token_ids = [token_id % decoder.config.vocab_size for token_id in range(first, first + count)]
        rows = torch.cat([_first_layer(decoder, PassKind.VERIFY, alone, [token_id]) for token_id in token_ids])
        if not torch.equal(rows, _first_layer(decoder, PassKind.VERIFY, together, token_ids)):
            return False
    return True


def _first_layer(decoder: Decoder, kind: PassKind, cache: SequenceCache, token_ids: Sequence[int]) -> torch.Tensor:
    batch = decoder.batch(kind, [cache], [len(token_ids)], [Identity()])
    hidden = decoder.run_layer(0, (Action.FULL,) * len(token_ids), decoder.embed(token_ids), batch)
    batch.commit()
    return hidden
