"""Rounded layers attend to keys and values in INT8, where the processor multiplies bytes. Those in bf16 remain."""

import pytest
import torch

from dash_runtime.layers.compensation import Identity
from tests.runtime.layer_case import FINER, Case
from tests.runtime.native_code import NATIVE_SIZES, native_library
from tests.tiny_models import save_tiny_model

SPANS = ((140, 1), (133, 5), (64, 1), (17, 2))
"""Contexts of up to three blocks, whose last one is full, or holds anything from a position on."""
KERNELS = ("INT8", "INT4", FINER)


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral-sliding-window"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if not native_library().rounds_keys:
        pytest.skip("this processor's rounded layers attend to keys and values in bf16")
    family = request.param
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / family, family, **NATIVE_SIZES)
    return Case(folder, {"attention_scale": 1.0}, SPANS, num_positions=144)


@torch.inference_mode()
def test_they_differ_from_others_as_rounding_keys_values_and_queries_says(case: Case) -> None:
    for kernel in KERNELS:
        outputs, in_bf16 = (case.run(kernel, keys_in_int8=own).outputs.float() for own in (True, False))
        expected, usual = (case.body(kernel, None, True, own).outputs for own in (True, False))
        torch.testing.assert_close(outputs, expected, rtol=0.01, atol=0.15)
        # Inputs that are nearly half-way between two bytes go either way, so no two runs are the same.
        both = torch.stack([(outputs - in_bf16).flatten(), (expected - usual).flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.3, kernel


@torch.inference_mode()
def test_whoever_reads_them_first_writes_the_same(case: Case) -> None:
    for kernel in KERNELS:
        together, alone = (case.run(kernel, False, Identity(), apart, keys_in_int8=True) for apart in (False, True))
        assert all(map(torch.equal, vars(together).values(), vars(alone).values())), kernel
