"""A layer's arithmetic is written twice, for eager passes and for Inductor, and both compute the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.inductor import layer_vectors
from dash_runtime.decoder.backends.needed_programs import why_eager
from dash_runtime.layers.attention import attention
from dash_runtime.layers.layer_body import before_attention, run_layer_body, split_heads
from dash_runtime.layers.rotary import RotaryTable
from dash_runtime.layers.weight_loader import LayerWeights, WeightLoader
from dash_runtime.linears.row_kernels import pack_row_matrix
from dash_runtime.model_config import Activation, BlockConfig, ModelConfig
from dash_runtime.programs.packing import WeightPacking
from dash_runtime.programs.traced_layer import FewRowsLayer, ModelShape
from dash_runtime.programs.traced_skip import SkippedLayer, SkippedRows
from tests.runtime.support import CPU
from tests.tiny_models import FAMILIES, save_tiny_model

NUM_SEEN = 9
VARIANTS = {
    "as it is": {},
    "gelu": {"activation": Activation.GELU_TANH},
    "attention scale": {"attention_scale": 0.3},
    "residual multiplier": {"residual_multiplier": 0.22},
}


def model_of(family: str, folder: Path, variant: str) -> tuple[ModelConfig, WeightLoader]:
    folder = save_tiny_model(folder / family, family, vocab_size=272)
    config = load_model_config(folder)
    config = replace(config, block=replace(config.block, **VARIANTS[variant]))
    weights = {name: tensor.bfloat16() for name, tensor in open_weights(folder).items()}
    for name, tensor in weights.items():  # norms and biases that are all alike would hide a mistake
        if tensor.dim() == 1:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            weights[name] = (tensor + 0.3 * torch.randn(tensor.shape, generator=generator)).bfloat16()
    return config, WeightLoader(config, weights, torch.float32, CPU)


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def packed_for_programs(weights: LayerWeights) -> tuple[WeightPacking, tuple[Tensor, ...]]:
    matrices = weights.linears.matrices()
    vectors = layer_vectors(weights)
    packed = [pack_row_matrix(Action.FULL, own.weight.bfloat16(), own) for own in matrices]
    packing = WeightPacking.of(vectors, packed)
    return packing, tuple(packing.join(vectors, packed))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_traced_layer_computes_what_the_layer_body_does(family: str, variant: str, tmp_path: Path) -> None:
    config, loader = model_of(family, tmp_path, variant)
    if why_eager(config, NUM_SEEN) is not None:
        pytest.skip("runs eagerly only")
    weights, shape = loader.layer(1), ModelShape.of(config)
    rope = RotaryTable(config.ropes[1], config.head_dim, NUM_SEEN, torch.float32, CPU)
    cosines, sines = rope.at(slice(NUM_SEEN - 1, NUM_SEEN))
    hidden = some(1, config.hidden_size, seed=1)
    kept = (NUM_SEEN, config.num_kv_heads, config.head_dim)
    keys, values = some(*kept, seed=2), some(*kept, seed=3)

    packing, joined = packed_for_programs(weights)
    traced = FewRowsLayer(shape, Action.FULL, packing)
    own_keys, own_values = keys.clone(), values.clone()
    outputs = traced(hidden, own_keys, own_values, cosines, sines, joined)

    def body(block: BlockConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the layer's output, and the keys and values that it adds."""
        added: list[Tensor] = []

        def attend(normed: Tensor) -> Tensor:
            fused = weights.linears.query_key_value(normed)
            queries, *new = split_heads(replace(config, block=block), weights, fused, config.num_heads, cosines, sines)
            added.extend(new)
            seen = (
                torch.cat((old[:-1].float(), own.bfloat16().float()))
                for old, own in zip((keys, values), new, strict=True)
            )
            return attention(queries, *seen, None, block.attention_scale)

        return run_layer_body(block, weights, weights.linears, hidden.float(), attend), *added  # type: ignore[return-value]

    expected, new_keys, new_values = body(config.block)
    torch.testing.assert_close(outputs.float(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(own_keys[-1:].float(), new_keys, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(own_values[-1:].float(), new_values, rtol=0.01, atol=1e-3)
    if variant != "as it is":  # or the comparison would show nothing
        usual = replace(config.block, **{name: getattr(BlockConfig(), name) for name in VARIANTS[variant]})
        assert not torch.allclose(body(usual)[0], expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_traced_skip_writes_the_keys_and_values_of_the_layer_body(family: str, tmp_path: Path) -> None:
    config, loader = model_of(family, tmp_path, "as it is")
    if why_eager(config, NUM_SEEN) is not None:
        pytest.skip("runs eagerly only")
    num_rows = 3
    weights, shape = loader.layer(1), ModelShape.of(config)
    rope = RotaryTable(config.ropes[1], config.head_dim, NUM_SEEN, torch.float32, CPU)
    cosines, sines = rope.at(slice(NUM_SEEN - num_rows, NUM_SEEN))
    hidden = some(num_rows, config.hidden_size, seed=1)
    fused = weights.linears.query_key_value(before_attention(weights, hidden.float()))
    _, *expected = split_heads(config, weights, fused, config.num_heads, cosines, sines)
    packing, joined = packed_for_programs(weights)
    compensation = (torch.cat((torch.full((config.hidden_size,), 0.5), torch.ones(config.hidden_size))).bfloat16(),)

    def assert_written(written: list[Tensor], outputs: Tensor, rows: slice) -> None:
        for own, others in zip(written, expected, strict=True):
            torch.testing.assert_close(own.float(), others[rows], rtol=0.01, atol=1e-3)
        torch.testing.assert_close(outputs.float(), hidden[rows].float() * 0.5 + 1, rtol=0.01, atol=0.01)

    for row in range(num_rows):
        kept = [torch.zeros(NUM_SEEN, config.num_kv_heads, config.head_dim).bfloat16() for _ in range(2)]
        own = slice(row, row + 1)
        skipped = SkippedLayer(shape, Action.FULL, packing, rank=0)
        outputs = skipped(hidden[own], *kept, cosines[own], sines[own], joined, compensation)
        assert_written([tensor[-1:] for tensor in kept], outputs, own)
        assert not any(tensor[:-1].any() for tensor in kept)
    blocks = [torch.zeros(4, 16, config.num_kv_heads, config.head_dim).bfloat16() for _ in range(2)]
    slots = torch.tensor([5, 40, 17])
    skipped_rows = SkippedRows(shape, Action.FULL, packing, rank=0)
    outputs = skipped_rows(hidden, *blocks, slots, cosines, sines, joined, compensation)
    assert_written([tensor.flatten(0, 1)[slots] for tensor in blocks], outputs, slice(None))
