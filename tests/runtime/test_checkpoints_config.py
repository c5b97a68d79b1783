"""A config.json becomes a ModelConfig, or is refused by the name of what is not supported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dash_runtime.checkpoints import load_model_config
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.model_config import MixtureConfig, RopeConfig, RopeKind

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 260,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

GEMMA3 = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
MINISTRAL3 = LLAMA | {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "head_dim": 16}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}


def write_config(folder: Path, keys: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_shape_is_read(tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path / "some-model", LLAMA))
    assert config.name == "some-model"
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (4, 64, 96)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.context_length, config.vocab_size) == (512, 260)
    assert set(config.ropes) == {RopeConfig(10000.0)}
    assert config.sliding_window == (None,) * 4


@pytest.mark.parametrize(
    ("keys", "biases_and_norm"),
    [
        (LLAMA, (False, False, False, False)),
        (LLAMA | {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        (MISTRAL, (False, False, False, False)),
        (QWEN2, (True, False, False, False)),
        (QWEN3, (False, False, False, True)),
        (QWEN3 | {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_follow_the_architecture(
    tmp_path: Path, keys: dict[str, Any], biases_and_norm: tuple[bool, ...]
) -> None:
    config = load_model_config(write_config(tmp_path, keys))
    found = (
        *(config.block.has_qkv_bias, config.block.has_output_bias, config.block.has_mlp_bias),
        config.block.qk_norm is not None,
    )
    assert found == biases_and_norm


def test_an_explicit_head_size_and_a_missing_number_of_kv_heads_are_understood(tmp_path: Path) -> None:
    keys = LLAMA | {"head_dim": 32, "num_key_value_heads": None}
    config = load_model_config(write_config(tmp_path, keys))
    assert (config.head_dim, config.num_kv_heads) == (32, 4)


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONGROPE["original_max_position_embeddings"] = 128


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(5e5, RopeKind.LINEAR, 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, RopeConfig(5e5, RopeKind.LLAMA3, 32.0, 1.0, 4.0, 8192)),
        (
            {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}},
            RopeConfig(5e5, RopeKind.LLAMA3, 32.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rotary_parameters_are_read_in_the_old_and_the_new_spelling(
    tmp_path: Path, keys: dict[str, Any], rope: RopeConfig
) -> None:
    assert load_model_config(write_config(tmp_path, LLAMA | keys)).ropes == (rope,) * LLAMA["num_hidden_layers"]


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        (MISTRAL | {"sliding_window": 7}, (7, 7, 7, 7)),
        (MISTRAL | {"sliding_window": None}, (None,) * 4),
        (QWEN2 | {"sliding_window": 7, "max_window_layers": 2}, (None,) * 4),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, (None, None, 7, 7)),
        (QWEN3_MOE | {"sliding_window": 7}, (None,) * 4),
        (QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 7}, (7, 7, 7, 7)),
        (
            QWEN3
            | {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (7, None, 7, None),
        ),
    ],
)
def test_sliding_windows_are_per_layer(tmp_path: Path, keys: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert load_model_config(write_config(tmp_path, keys)).sliding_window == windows


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({}, {0, 1, 2, 3}),
        ({"decoder_sparse_step": 2}, {1, 3}),
        ({"mlp_only_layers": [0, 2]}, {1, 3}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1}),
        ({"num_experts": None, "num_local_experts": 8}, {0, 1, 2, 3}),  # transformers 5 saves it so
        ({"decoder_sparse_step": 5}, set()),
    ],
)
def test_experts_are_in_the_layers_that_the_configuration_names(
    tmp_path: Path, keys: dict[str, Any], layers: set[int]
) -> None:
    named = {key: value for key, value in (QWEN3_MOE | keys).items() if value is not None}
    mixture = load_model_config(write_config(tmp_path, named)).mixture
    assert mixture == (MixtureConfig(frozenset(layers), 8, 2, 32, True) if layers else None)


def test_a_scaling_in_the_old_spelling_is_that_of_olmo_3s_full_attention(tmp_path: Path) -> None:
    keys = LLAMA | {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "rope_scaling": YARN}
    full, sliding = RopeConfig(5e5, RopeKind.YARN, 4.0, original_context_length=128), RopeConfig(5e5)
    config = load_model_config(
        write_config(tmp_path, keys | {"rope_theta": 5e5, "sliding_window": 7, "eos_token_id": 2})
    )
    ropes = [replace(rope, attention_factor=1.0) for rope in config.ropes if rope is not None]
    assert ropes == [sliding, sliding, sliding, full]
    assert config.sliding_window == (7, 7, 7, None)


@pytest.mark.parametrize(
    ("in_config", "generation", "expected"),
    [
        (2, None, {2}),
        (2, {"eos_token_id": [3, 4]}, {3, 4}),
        (2, {"eos_token_id": 5}, {5}),
        (2, {"temperature": 0.6}, {2}),
        ([2, 7], None, {2, 7}),
        (None, None, set()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, in_config: object, generation: dict[str, Any] | None, expected: set[int]
) -> None:
    folder = write_config(tmp_path, LLAMA | {"eos_token_id": in_config}, generation)
    assert load_model_config(folder).eos_token_ids == expected


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
            "GemmaForCausalLM is not supported; supported: LlamaForCausalLM, MistralForCausalLM,",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        (QWEN3_MOE | {"hidden_act": "relu"}, "'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*default, linear, llama3"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate of its rotary embedding must be true"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        (MINISTRAL3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_type must be yarn"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised already"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=named):
        load_model_config(write_config(tmp_path, LLAMA | keys))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": YARN | {"factor": -1}}, "factor of its rotary embedding"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta must be above 1"),
        ({"rope_scaling": YARN | {"beta_slow": 33}}, "beta_slow of its rotary embedding is above beta_fast"),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 7}},
            "long_factor of its rotary embedding is no list of 8",
        ),
        ({"rope_scaling": LONGROPE | {"short_factor": [0.0] * 8}}, "short_factor of its rotary embedding must be"),
        ({"model_type": "qwen2"}, "does not go with"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"eos_token_id": [1, -5]}, "eos_token_id"),
        (
            SMOLLM3 | {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 4},
            "no_rope_layers must have a 0 or 1 for each of 4 layers",
        ),
        (
            MINISTRAL3 | {"rope_parameters": YARN | {"rope_theta": 1e4}},
            "llama_4_scaling_beta must be a positive number",
        ),
        (SMOLLM3 | {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers"),
        (QWEN3_MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8, got 9"),
        (QWEN3_MOE | {"num_experts_per_tok": 0}, "num_experts_per_tok must be a positive integer"),
        (QWEN3_MOE | {"num_experts": 0}, "num_experts must be a positive integer"),
        (QWEN3_MOE | {"num_experts": 2**31}, "num_experts must be at most 1024"),
        (QWEN3_MOE | {"moe_intermediate_size": -1}, "moe_intermediate_size"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN3_MOE | {"mlp_only_layers": [[0]]}, "mlp_only_layers"),
        (QWEN3_MOE | {"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
)
def test_values_that_make_no_sense_are_corrupt(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=named) as caught:
        load_model_config(write_config(tmp_path, LLAMA | keys))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x01", '{"model_type": '])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_malformed_json_names_its_file(tmp_path: Path, name: str, text: str) -> None:
    write_config(tmp_path, LLAMA)
    (tmp_path / name).write_text(text)
    with pytest.raises(CorruptCheckpoint, match=name):
        load_model_config(tmp_path)


def test_a_missing_folder_and_a_missing_config_name_their_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no-folder"):
        load_model_config(tmp_path / "no-folder")
    with pytest.raises(CheckpointNotFound, match=r"config\.json"):
        load_model_config(tmp_path)


def test_a_folder_of_the_hubs_cache_is_called_by_its_hub_id(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "models--Some-Org--a-model" / "snapshots" / "0a1b2c", LLAMA)
    assert load_model_config(folder).name == "Some-Org/a-model"
    assert load_model_config(folder, "chosen").name == "chosen"
