"""Rows of prompts have the same bits in native code however a prompt is cut, whatever runs beside it."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.native.library import NativeLibrary
from dash_runtime.passes import PassPlan
from tests.runtime.native_model import SIZES, WIDE, native_decoder
from tests.runtime.support import ALL_ACTIONS
from tests.tiny_models import save_tiny_model

BLOCK = 64
"""Positions that attention takes at once."""
Ids = Sequence[int]


def some_ids(count: int) -> list[int]:
    return [(41 * place + 7 + 13 * count) % 250 for place in range(count)]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", SIZES), ("llama", WIDE), ("qwen2-sliding-window", SIZES), ("qwen3-moe", SIZES)]
)
@pytest.mark.parametrize("action", ALL_ACTIONS[1:])
def test_prompts_have_the_same_bits_however_they_are_cut_and_whatever_runs_beside_them(
    tmp_path: Path, native_library: NativeLibrary, family: str, sizes: Mapping[str, float], action: Action
) -> None:
    decoder = native_decoder(save_tiny_model(tmp_path, family, **sizes), native_library)

    def prefill(caches: Sequence[SequenceCache], ids: Sequence[Ids]) -> Tensor:
        batch = decoder.batch(PassKind.PREFILL, caches, [len(own) for own in ids], [Identity()] * len(caches))
        result = decoder.run_pass(
            PassPlan.of([action] * decoder.num_layers), [token_id for own in ids for token_id in own], batch
        )
        batch.commit()
        assert result.states is not None
        return result.states

    prompts = [some_ids(count) for count in (3 * BLOCK + 38, 3, 40)]
    together = decoder.caches([256] * len(prompts))
    states = prefill(together, prompts).split([len(prompt) for prompt in prompts])
    for cuts in ((1, 14, 15, 16, 17, BLOCK), (39,), (61,), (101,), (129,)):
        alone = decoder.caches([256] * len(prompts))
        for cache, other, prompt, expected in zip(alone, together, prompts, states, strict=True):
            bounds = [0, *(own for own in accumulate(cuts) if own < len(prompt)), len(prompt)]
            parts = [prefill([cache], [prompt[first:last]]) for first, last in pairwise(bounds)]
            assert torch.equal(torch.cat(parts), expected), cuts
            assert torch.equal(cache.memory[:, :, : cache.length], other.memory[:, :, : cache.length])
