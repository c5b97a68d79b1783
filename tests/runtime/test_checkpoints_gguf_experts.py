"""A GGUF file's stacked experts become one matrix each, or are refused in one sentence."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.checkpoints.gguf_conversion import convert_gguf
from dash_runtime.errors import CorruptCheckpoint
from tests.runtime.gguf_files import write_gguf
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("models") / "moe", "qwen3-moe", num_experts=64, num_hidden_layers=2, dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"without": "qwen3moe.expert_count"}, "lacks 'qwen3moe.expert_count'"),
        ({"without": "qwen3moe.expert_used_count"}, "lacks 'qwen3moe.expert_used_count'"),
        ({"without": "qwen3moe.expert_feed_forward_length"}, "lacks 'qwen3moe.expert_feed_forward_length'"),
        ({"metadata": {"qwen3moe.expert_used_count": 65}}, "num_experts_per_tok must be at most 64, got 65"),
        ({"metadata": {"qwen3moe.expert_count": 63}}, r"ffn_gate_inp.weight has the shape \[64, 96\]"),
        ({"without": "blk.0.ffn_up_exps.weight"}, "no tensor blk.0.ffn_up_exps.weight"),
        ({"without": "blk.0.ffn_gate_inp.weight"}, "no tensor blk.0.ffn_gate_inp.weight"),
    ],
)
def test_experts_that_contradict_the_metadata_are_corrupt(
    mixture: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    gguf = write_gguf(tmp_path / "odd.gguf", mixture, architecture="qwen3moe", **change)
    with pytest.raises(CorruptCheckpoint, match=named):
        convert_gguf(gguf, tmp_path)


def test_stacked_experts_are_converted_one_at_a_time_and_keep_their_numbers(mixture: Path, tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    gguf = write_gguf(tmp_path / "moe.gguf", mixture, architecture="qwen3moe", kind=kind)
    convert_gguf(gguf, tmp_path)  # imports what a first conversion imports
    tracemalloc.start()
    convert_gguf(gguf, tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    config, weights = load_model_config(tmp_path), open_weights(tmp_path)
    assert config.mixture is not None
    assert peak_bytes < 4 * config.mixture.num_experts * config.mixture.expert_size * config.hidden_size
    for name, tensor in open_weights(mixture).items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), atol=0.01, rtol=0.02)
