"""Rotary tables are those of transformers, for every kind of scaling and on both sides of the original context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dash_runtime.families.rope_reader import RopeReader
from dash_runtime.layers.rotary import RotaryTable
from tests.runtime.support import CPU

HEAD_DIM = 16
CONTEXT_LENGTH, ORIGINAL = 256, 64
FACTORS = {
    "short_factor": [1.0 + 0.1 * place for place in range(8)],
    "long_factor": [2.0 + place for place in range(8)],
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn with betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn with an attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2},
    "yarn with mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "longrope": {"rope_type": "longrope", **FACTORS},
    "longrope with a factor": {"rope_type": "longrope", "factor": 8.0, **FACTORS},
    "longrope with an attention factor": {"rope_type": "longrope", "attention_factor": 1.1, **FACTORS},
}


@pytest.mark.parametrize("num_tokens", [ORIGINAL, ORIGINAL + 1, CONTEXT_LENGTH])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_sequence_is_rotated_as_in_transformers(scaling: dict[str, Any], num_tokens: int) -> None:
    parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL, **scaling}
    rope = RopeReader(parameters, Path("config.json"), CONTEXT_LENGTH, HEAD_DIM).read()
    table = RotaryTable(rope, HEAD_DIM, CONTEXT_LENGTH, torch.float32, CPU)
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=CONTEXT_LENGTH, rope_parameters=parameters)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(num_tokens).unsqueeze(0))

    first = table.first_row(num_tokens)
    cosines, sines = table.at(slice(first, first + num_tokens))

    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(HEAD_DIM // 2)
    torch.testing.assert_close(cosines[:, 0], expected[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(sines[:, 0], expected[1][0] * signs, atol=1e-5, rtol=0)


def test_a_table_that_ends_within_the_original_context_has_no_second_part() -> None:
    parameters = {"rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL, **SCALINGS["longrope"]}
    rope = RopeReader(parameters, Path("config.json"), CONTEXT_LENGTH, HEAD_DIM).read()
    table = RotaryTable(rope, HEAD_DIM, ORIGINAL, torch.float32, CPU)
    assert len(table.cosines) == ORIGINAL
    assert table.first_row(CONTEXT_LENGTH) == 0
