"""A small model with a policy, for native code; and decoders that run it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.decoder.backends.native import NativeBackend, why_eager
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_native_decoder, pack_in_memory
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.heads import Heads
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.layer import DecoderLayer, make_layer
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.dense_linear import FullLinear, make_full_linear
from dash_runtime.linears.quantization import refined_linear
from dash_runtime.native.library import NativeLibrary
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import save_policy
from tests.runtime.random_policy import random_policy
from tests.runtime.support import ALL_ACTIONS, CPU, load_decoder, loop_ends
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

MAX_DIVERGENCE = 0.01
"""Nats. Rounding to bf16 at other places makes a tenth of this, plans in another order a hundred times as much."""


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


def eager_decoder(folder: Path) -> Decoder:
    """Returns a decoder that runs the model in `folder` eagerly, in INT8 with the matrices of native code."""
    config, decoder = load_model_config(folder), load_decoder(folder, torch.bfloat16)
    loader = WeightLoader(config, open_weights(folder), torch.bfloat16, CPU)
    layers: list[DecoderLayer] = []
    for weights in map(loader.layer, range(config.num_layers)):
        layer = make_layer(weights, config.query_size, ALL_ACTIONS)
        refined = weights.linears.mapped(_refined, make_full_linear)
        layers.append(replace(layer, linears={**layer.linears, Action.INT8: refined}))
    ends, heads = loop_ends(decoder), Heads(decoder.heads)
    few, many = (EagerBackend(ends, config, own, heads) for own in (layers, [own.for_many_rows() for own in layers]))
    decoder.backends = {PassKind.PREFILL: [many], PassKind.DECODE: [few], PassKind.VERIFY: [few]}
    return decoder


def _refined(full: FullLinear) -> FullLinear:
    own = refined_linear(full)
    return replace(own, weight=own.weight.to(full.weight.dtype))


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Returns the largest of the rows' KL divergences, in nats."""
    targets, own = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((targets.exp() * (targets - own)).sum(-1).max())


def assert_same_cache(own: SequenceCache, expected: SequenceCache) -> None:
    """Asserts that keys and values agree within the rounding of bf16, and of inputs to bytes where they are that."""
    assert own.length == expected.length
    for mine, theirs in ((own.keys, expected.keys), (own.values, expected.values)):
        for my_layer, their_layer in zip(mine, theirs, strict=True):
            written, others = my_layer[: own.length], their_layer[: own.length]
            torch.testing.assert_close(written, others, rtol=0.1, atol=0.1 * float(others.abs().amax()))
