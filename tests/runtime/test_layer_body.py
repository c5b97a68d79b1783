"""A layer's arithmetic is written twice, for eager passes and in native code, and both compute the same."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_runtime.checkpoints import load_model_config
from dash_runtime.decoder.backends.native import why_eager
from dash_runtime.layers.compensation import Affine, Compensation, Identity, LowRank, PackedLowRank, Scale
from dash_runtime.layers.layer_body import before_attention, split_heads
from dash_runtime.model_config import Activation, BlockConfig, ModelConfig
from tests.runtime.layer_case import FINER, LAYER, NUM_POSITIONS, Case, Written, rounded_linears, some
from tests.runtime.native_code import NATIVE_SIZES, in_bytes
from tests.tiny_models import FAMILIES, save_tiny_model

EAGER_FAMILIES = (
    "llama-untied-biased",
    "granite-untied-biased",
    "olmo2-tied-biased",
)
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6}
OVERRIDES = {
    "ministral3-sliding-window": {"head_dim": 32},
    "qwen3-moe-tied-unnormed": {"num_experts_per_tok": 8},
} | {
    family: {"rope_parameters": FAMILIES[family][1]["rope_parameters"] | _FACTORS}
    for family in ("phi3-longrope", "phi3-longrope-sliding-window")
}
"""Heads as long as native code needs them. All experts are chosen: rounding would choose others."""
KERNELS = ("FULL", "INT8", "INT4", "INT3", FINER)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gelu": {"activation": Activation.GELU_TANH},
    "attention scale": {"attention_scale": 0.3},
    "residual multiplier": {"residual_multiplier": 0.22},
}


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family not in EAGER_FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    sizes = NATIVE_SIZES | OVERRIDES.get(family, {})
    return save_tiny_model(tmp_path_factory.mktemp("models") / family, family, **sizes)


def assert_close(kernel: str, written: Written, expected: Written) -> None:
    # Where the processor multiplies bf16, products in FULL get their inputs rounded to it; where it multiplies bytes,
    # the others get theirs rounded to these.
    tolerance = 0.04 if kernel == "FULL" else 0.25  # a byte that is rounded the other way
    for name in ("outputs", "keys", "values"):
        own, wanted = getattr(written, name).float(), getattr(expected, name)
        torch.testing.assert_close(own, wanted, rtol=0.01, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_native_rows_of_every_kernel_compute_what_the_layer_body_does(folder: Path, variant: str) -> None:
    case = Case(folder, VARIANTS[variant])
    for kernel in KERNELS:
        assert_close(kernel, case.run(kernel), expected := case.body(kernel))
        if variant != "as it is":  # or the comparison would show nothing
            usual = {name: getattr(BlockConfig(), name) for name in VARIANTS[variant]}
            as_usual = case.body(kernel, replace(case.config.block, **usual))
            assert not torch.allclose(as_usual.outputs, expected.outputs, rtol=0.01, atol=0.01)


@torch.inference_mode()
def test_rows_have_the_same_bits_together_as_one_by_one(folder: Path) -> None:
    case = Case(folder)
    for kernel in KERNELS:
        for is_skipped in (False, True):
            together, alone = (case.run(kernel, is_skipped, Identity(), apart) for apart in (False, True))
            assert all(map(torch.equal, vars(together).values(), vars(alone).values())), (kernel, is_skipped)


@torch.inference_mode()
def test_skipped_rows_write_the_keys_and_values_of_the_layer_body(folder: Path) -> None:
    case = Case(folder)
    for kernel in KERNELS:
        normed = before_attention(case.weights, case.hidden.float())
        fused = rounded_linears(case.weights, kernel).query_key_value(normed)
        cosines, sines = (own[[position for position, _ in case.places]].float() for own in case.tables)
        _, *added = split_heads(case.config, case.weights, fused, case.config.num_heads, cosines, sines)
        assert_close(kernel, case.run(kernel, True, Identity()), Written(case.hidden.float(), *added))


def compensations(config: ModelConfig) -> Sequence[Compensation]:
    num_layers, size = config.num_layers, config.hidden_size
    factors, offsets = 1 + 0.1 * some(num_layers, size, seed=5).bfloat16(), some(num_layers, size, seed=6).bfloat16()
    low_ranks = []
    for rank in (32, 48):  # kernels read 32 inputs at a time
        down, up = 0.2 * some(num_layers, rank, size, seed=7), 0.2 * some(num_layers, size, rank, seed=8)
        low_ranks.append(PackedLowRank.from_low_rank(LowRank(down, up, offsets), torch.bfloat16))
    return Identity(), Scale(factors[:, 0]), Affine(factors, offsets), *low_ranks


@torch.inference_mode()
def test_native_compensation_is_that_of_eager_passes(tmp_path: Path) -> None:
    case = Case(save_tiny_model(tmp_path / "model", "llama", **NATIVE_SIZES))
    hidden = case.hidden.float()
    for compensation in compensations(case.config):
        wide = compensation.to_low_rank() if isinstance(compensation, PackedLowRank) else compensation
        possible = [wide(LAYER, hidden).float()]
        if isinstance(wide, LowRank):  # some processors multiply bytes
            down, up, offsets = wide.down[LAYER], wide.up[LAYER], wide.offsets[LAYER]
            possible.append(hidden + in_bytes(in_bytes(hidden) @ down.T) @ up.T + offsets)
        outputs = case.run("INT8", True, compensation).outputs.float()
        assert any(torch.allclose(outputs, expected, rtol=0.01, atol=0.01) for expected in possible)


@pytest.mark.parametrize("family", EAGER_FAMILIES)
def test_these_families_run_eagerly(family: str, tmp_path: Path) -> None:
    config = load_model_config(save_tiny_model(tmp_path / family, family, **NATIVE_SIZES))
    assert why_eager(config, NUM_POSITIONS) == "biases of outputs"
