"""Writes a GGUF file's architecture as the keys of a Hugging Face config.json.

Knows the metadata keys of llama.cpp's converter. Reads no tensors but the rotary factors, which that converter stores
as one.
"""

import math
from collections.abc import Sequence
from ctypes import c_float
from typing import Any

from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families import FAMILIES, Family
from dash_runtime.files.wording import quoted

ROPE_FACTORS = "rope_freqs.weight"

# Llama 3.1's and 3.2's values; a GGUF file has the resulting factors instead.
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


def gguf_family(gguf: GgufFile, families: Sequence[Family] = FAMILIES) -> Family:
    """Returns the family that the file's `general.architecture` names.

    Raises:
        UnsupportedArchitecture: no family has this name, or the file is a mixture of experts or split.
    """
    name = gguf.require("general.architecture", str)
    by_name = {family.gguf_architecture: family for family in families if family.gguf_architecture is not None}
    if name not in by_name:
        raise UnsupportedArchitecture(
            f"{gguf.path}: GGUF architecture {quoted(name)} is not supported; supported: {', '.join(by_name)}."
        )
    if gguf.get(f"{name}.expert_count", int):
        raise UnsupportedArchitecture(f"{gguf.path}: mixtures of experts are not supported.")
    if (gguf.get("split.count", int) or 1) > 1:
        raise UnsupportedArchitecture(f"{gguf.path} is one part of several; join them with llama-gguf-split.")
    return by_name[name]


def config_keys(gguf: GgufFile, family: Family) -> dict[str, Any]:
    """Returns the keys of config.json for the model in `gguf`.

    Raises:
        CorruptCheckpoint: the metadata is incomplete or contradicts itself.
        UnsupportedArchitecture: there is no decoder for a feature of the model.
    """
    name, tensors = gguf.require("general.architecture", str), family.gguf_tensor_names
    hidden_size = gguf.require(f"{name}.embedding_length", int)
    num_heads = gguf.require(f"{name}.attention.head_count", int)
    num_layers = gguf.require(f"{name}.block_count", int)
    if not 0 < num_layers <= len(gguf.tensors) or num_heads < 1:
        raise CorruptCheckpoint(f"{gguf.path} is damaged: {num_layers} layers of {num_heads} heads cannot be.")
    head_dim = gguf.get(f"{name}.attention.key_length", int) or hidden_size // num_heads
    context_length = gguf.require(f"{name}.context_length", int)
    _refuse_features(gguf, name, head_dim, context_length)
    embedding = f"{tensors.embedding}.weight"
    if embedding not in gguf.tensors:
        raise CorruptCheckpoint(f"{gguf.path} is incomplete: it has no tensor {embedding}.")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": gguf.require(f"{name}.feed_forward_length", int),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.get(f"{name}.attention.head_count_kv", int) or num_heads,
        "head_dim": head_dim,
        "hidden_act": next(iter(family.activations)),
        "max_position_embeddings": context_length,
        "rms_norm_eps": _decimal(gguf.require(f"{name}.attention.layer_norm_rms_epsilon", float)),
        "vocab_size": gguf.tensors[embedding].shape[0],
        "tie_word_embeddings": f"{tensors.head}.weight" not in gguf.tensors,
        "use_cache": True,
        "dtype": "bfloat16",
    }
    config |= family.keys_from_gguf(gguf.tensors)
    config |= _rope(gguf, name, head_dim)
    for key in ("bos", "eos"):
        token_id = gguf.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            config[f"{key}_token_id"] = token_id
    return config


def eos_token_ids(gguf: GgufFile, vocab_size: int) -> list[int]:
    """Returns all tokens that end a generation: the ends of a text, a turn and a message.

    Raises:
        CorruptCheckpoint: one of them is outside the vocabulary.
    """
    ids = (gguf.get(f"tokenizer.ggml.{key}_token_id", int) for key in ("eos", "eot", "eom"))
    known = sorted({token_id for token_id in ids if token_id is not None})
    if known and not 0 <= known[0] <= known[-1] < vocab_size:
        raise CorruptCheckpoint(f"{gguf.path} is damaged: an end token of {quoted(known)} is outside its vocabulary.")
    return known


def _refuse_features(gguf: GgufFile, name: str, head_dim: int, context_length: int) -> None:
    if (gguf.get(f"{name}.attention.value_length", int) or head_dim) != head_dim:
        raise UnsupportedArchitecture(f"{gguf.path}: keys and values of different sizes are not supported.")
    if (gguf.get(f"{name}.rope.dimension_count", int) or head_dim) != head_dim:
        raise UnsupportedArchitecture(f"{gguf.path}: partial rotary embeddings are not supported.")
    window = gguf.get(f"{name}.attention.sliding_window", int)
    if window and window < context_length:
        raise UnsupportedArchitecture(
            f"{gguf.path}: a GGUF file does not say which layers its sliding window applies to; "
            "use the model's Hugging Face folder."
        )


def _rope(gguf: GgufFile, name: str, head_dim: int) -> dict[str, Any]:
    theta = _decimal(gguf.get(f"{name}.rope.freq_base", float) or 10000.0)
    kind = gguf.get(f"{name}.rope.scaling.type", str) or "none"
    if kind not in ("none", "linear"):
        raise UnsupportedArchitecture(
            f"{gguf.path}: rotary scaling {quoted(kind)} is not supported; supported: none, linear, llama3."
        )
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        factor = _decimal(gguf.require(f"{name}.rope.scaling.factor", float))
        scaling = {"rope_type": "linear", "factor": factor}
    elif ROPE_FACTORS in gguf.tensors:
        scaling = _llama3_scaling(gguf, theta, head_dim)
    # The older pair of keys is read by every version of transformers, and by other engines.
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3_scaling(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Returns the llama3 parameters that lead to the file's rotary factors, None if these are all one."""
    import numpy as np

    factors = gguf.dequantize(gguf.tensors[ROPE_FACTORS]).ravel()
    if not 0 < theta < math.inf or factors.min() <= 0:
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its rotary embedding has a base or a factor that cannot be.")
    if (factors == 1).all():
        return None
    factor = float(f"{factors.max():.6g}")  # a quotient of float32 numbers, so its last digit is noise
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    turns = _LLAMA3_ORIGINAL_CONTEXT / wavelengths
    smooth = (turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR)
    smooth = smooth.clip(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if 2 * len(factors) != head_dim or not np.allclose(factors, expected, rtol=1e-3, atol=0):
        raise UnsupportedArchitecture(
            f"{gguf.path}: its rotary factors ({ROPE_FACTORS}) are not those of Llama 3; "
            "use the model's Hugging Face folder."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def _decimal(value: float) -> float:
    """Returns the short decimal that a float32 was written from: 1e-05, not 9.999999747378752e-06."""
    short = float(f"{value:.7g}")
    return short if c_float(short).value == c_float(value).value else value
