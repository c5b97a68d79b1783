"""A small model with a policy, for native code; and decoders that run it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.native import NativeBackend, why_eager
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_native_decoder, pack_in_memory
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.native.library import NativeLibrary
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import save_policy
from tests.runtime.random_policy import random_policy
from tests.runtime.support import ALL_ACTIONS, CPU
from tests.tiny_models import save_tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 272}
"""Small sizes that the native code can take."""
NUM_THREADS = 2
BUDGETS = (0.5, 0.85)
WIDE = {
    "hidden_size": 576,
    "intermediate_size": 768,
    "vocab_size": 1024,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "initializer_range": 0.05,
}
"""Wide enough for sums whose bits depend on their order, as those of the library's products for many rows do."""

MAX_DIVERGENCE = 0.02
"""Nats. Rounding to bf16 at other places makes a twentieth of this, INT8 with a scale for each output instead of from
INT4 up to two thirds, plans in another order fifty times as much."""


@dataclass(frozen=True)
class SmallModel:
    """The model's folder, its policy's file, and a cache folder that has the native code."""

    folder: Path
    policy_file: Path
    cache_folder: Path


def save_small_model(folder: Path, family: str = "qwen2-sliding-window", **options: float) -> SmallModel:
    """Makes the model below `folder`, by default with full and sliding attention and biases, and an empty cache
    folder."""
    model = save_tiny_model(folder / "model", family, **(SIZES | options))
    policy_file = folder / "policy.safetensors"
    fingerprint = model_fingerprint(load_model_config(model), open_weights(model))
    save_policy(policy_file, random_policy(model, BUDGETS, block_size=1), fingerprint)
    return SmallModel(model, policy_file, folder / "cache")


def native_decoder(
    folder: Path,
    library: NativeLibrary,
    *,
    shares_heads: bool = False,
    num_threads: int = NUM_THREADS,
    actions: tuple[Action, ...] = ALL_ACTIONS,
    head_map: HeadMap | None = None,
) -> Decoder:
    """Returns a decoder that runs the model in `folder` natively."""
    config = load_model_config(folder)
    assert why_eager(config, config.context_length) is None
    native = NativeBackend(config, library, actions, num_threads, shares_heads=shares_heads)
    finer_keys = Action.INT8 if Action.INT8 in actions else None
    loader = WeightLoader(config, open_weights(folder), torch.bfloat16, CPU, finer_keys=finer_keys)
    packed = pack_in_memory(loader, actions, head_map)
    return make_native_decoder(config, packed, native, actions, context_length=config.context_length, head_map=head_map)


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Returns the largest of the rows' KL divergences, in nats."""
    targets, own = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((targets.exp() * (targets - own)).sum(-1).max())


def assert_same_cache(own: SequenceCache, expected: SequenceCache) -> None:
    """Asserts that keys and values agree within the rounding of bf16, of inputs to bytes where they are that, and of
    INT8, which has a scale for each output in one and is refined from INT4 in the other."""
    assert own.length == expected.length
    for mine, theirs in ((own.keys, expected.keys), (own.values, expected.values)):
        for my_layer, their_layer in zip(mine, theirs, strict=True):
            written, others = my_layer[: own.length], their_layer[: own.length]
            torch.testing.assert_close(written, others, rtol=0.15, atol=0.15 * float(others.abs().amax()))
