"""Writes tiny GGUF files as llama.cpp's converter would, from the tests' tiny Hugging Face models."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import Tokenizer

from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.checkpoints.gguf_parameters import gguf_sources
from dash_runtime.families import FAMILIES
from dash_runtime.model_config import ModelConfig, RopeKind

BOS_TOKEN_ID = 257
CONTROL_TOKEN_IDS = (256, 257, 258)
USER_DEFINED_TOKEN_ID = 259
PERMUTED = ("llama", "granite", "smollm3", "mistral3")
"""Architectures whose converter derives from llama.cpp's LlamaModel, which reorders queries and keys."""


def write_gguf(
    path: Path,
    folder: Path,
    *,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: str = "",
    most_tensors: int = 0,
) -> Path:
    """Writes the model of `folder` as GGUF.

    Args:
        metadata: values (int, float, bool or text) to add to the converter's, or to replace them with.
        tensors: the same for tensors.
        without: the name of a tensor or value to leave out.
        most_tensors: in one file. If there are more, the model is split as llama.cpp does it, and the first file's path
            returned.
    """
    config = load_model_config(folder)
    values = _metadata(config, architecture) | _own_metadata(folder, config, architecture) | dict(metadata or {})
    arrays = _tensors(folder, config, architecture) | dict(tensors or {})
    values.pop(without, None)
    arrays.pop(without, None)
    arch = values.pop("general.architecture", architecture)
    writer = GGUFWriter(path, arch=arch, split_max_tensors=most_tensors)
    adders = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for key, value in values.items():
        writer.add_array(key, value) if isinstance(value, list) else adders[type(value)](key, value)
    for name, array in arrays.items():
        is_rounded = array.ndim > 1 and "ffn_gate_inp" not in name
        array_kind = kind if is_rounded else GGMLQuantizationType.F32
        raw = quantize(np.ascontiguousarray(array, np.float32), array_kind)
        writer.add_tensor(name, raw, raw_dtype=array_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*"))[0] if most_tensors else path


def _metadata(config: ModelConfig, architecture: str) -> dict[str, Any]:
    types = [TokenType.NORMAL] * config.vocab_size
    for token_id in CONTROL_TOKEN_IDS:
        types[token_id] = TokenType.CONTROL
    types[USER_DEFINED_TOKEN_ID] = TokenType.USER_DEFINED
    return {
        f"{architecture}.block_count": config.num_layers,
        f"{architecture}.context_length": config.context_length,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_heads,
        f"{architecture}.attention.head_count_kv": config.num_kv_heads,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.attention.value_length": config.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tiny_tokens(),
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"],
        "tokenizer.ggml.eos_token_id": min(config.eos_token_ids),
        "tokenizer.ggml.bos_token_id": BOS_TOKEN_ID,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}!{% endfor %}",
    }


def _own_metadata(folder: Path, config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Returns what the converter writes of scalings and for one architecture only."""
    raw = json.loads((folder / "config.json").read_text())
    rope = raw["rope_parameters"]
    full_rope = rope.get("full_attention", rope)
    scaling = _scaling_metadata(full_rope, f"{architecture}.rope.scaling")
    scaling[f"{architecture}.rope.freq_base"] = float(full_rope["rope_theta"])
    if architecture == "granite":
        scaling |= {
            "granite.embedding_scale": float(raw["embedding_multiplier"]),
            "granite.attention.scale": float(raw["attention_multiplier"]),
            "granite.residual_scale": float(raw["residual_multiplier"]),
            "granite.logit_scale": float(raw["logits_scaling"]),
        }
    if "layer_types" in raw and architecture == "olmo2":
        scaling |= {
            "olmo2.attention.sliding_window": raw["sliding_window"],
            "olmo2.attention.sliding_window_pattern": [kind == "sliding_attention" for kind in raw["layer_types"]],
        }
    if architecture == "qwen3moe":
        scaling |= {
            "qwen3moe.expert_count": raw["num_local_experts"],
            "qwen3moe.expert_used_count": raw["num_experts_per_tok"],
            "qwen3moe.expert_feed_forward_length": raw["moe_intermediate_size"],
        }
    if architecture == "gemma3":
        scaling["gemma3.attention.sliding_window"] = raw["sliding_window"]
    if architecture == "mistral3":
        scaling |= {
            "mistral3.rope.scaling.yarn_log_multiplier": float(rope["mscale_all_dim"]),
            "mistral3.attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
        }
    if architecture == "phi3":
        original = raw["original_max_position_embeddings"]
        scaling |= {
            "phi3.rope.scaling.original_context_length": original,
            "phi3.rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
            "phi3.attention.sliding_window": raw["sliding_window"] or 0,
        }
        if "long_factor" in rope:
            factor = math.log(raw["max_position_embeddings"] / original)
            scaling["phi3.rope.scaling.attn_factor"] = math.sqrt(1 + factor / math.log(original))
    return scaling


def _scaling_metadata(rope: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns what the converter writes of `rope_parameters` in config.json."""
    if rope["rope_type"] == "linear":
        return {f"{prefix}.type": "linear", f"{prefix}.factor": rope["factor"]}
    if rope["rope_type"] == "longrope":
        return {f"{prefix}.type": "longrope"}
    if rope["rope_type"] == "yarn":
        own = {
            "type": "yarn",
            "factor": float(rope["factor"]),
            "original_context_length": rope["original_max_position_embeddings"],
            "yarn_attn_factor": rope.get("attention_factor"),
            "yarn_beta_fast": rope.get("beta_fast"),
            "yarn_beta_slow": rope.get("beta_slow"),
        }
        return {f"{prefix}.{key}": value for key, value in own.items() if value is not None}
    return {}


def tiny_tokens() -> list[str]:
    """Returns the 256 bytes, three of them replaced by the results of the merges, and the special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    never = set("ÀÁõ")  # 0xC0, 0xC1 and 0xF5 are in no UTF-8 text
    tokens = ["ab", "abc", "Ġa", *sorted(set(ByteLevel.alphabet()) - never)]
    return [*tokens, "<|end|>", "<|user|>", "<|assistant|>", "<think>"]


def _tensors(folder: Path, config: ModelConfig, architecture: str) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    sources = gguf_sources(config, next(family for family in FAMILIES if family.gguf_architecture == architecture))
    for name, tensor in open_weights(folder).items():
        array = tensor.float().numpy()
        if architecture in PERMUTED and (".q_proj." in name or ".k_proj." in name):
            num_heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
            # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
            halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        source = sources[name]
        if source.place is None:
            arrays[source.name] = array
        else:
            arrays.setdefault(source.name, np.zeros(source.shape, np.float32))[source.place] = array
    rope = config.ropes[0]
    if rope is not None and rope.kind is RopeKind.LONGROPE:
        arrays["rope_factors_short.weight"] = np.array(rope.short_factors)
        arrays["rope_factors_long.weight"] = np.array(rope.long_factors)
    return arrays


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
