"""Writes a GGUF file's architecture as the keys of a Hugging Face config.json.

Knows the metadata keys of llama.cpp's converter that families share; each family reads its own. Reads no tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.gguf_rope import rope_scaling, rope_theta
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families import FAMILIES, Family
from dash_runtime.files.wording import quoted


def gguf_family(gguf: GgufFile, families: Sequence[Family] = FAMILIES) -> Family:
    """Returns the family that the file's `general.architecture` names.

    Raises:
        UnsupportedArchitecture: no family has this name.
    """
    name = gguf.require("general.architecture", str)
    known = dict.fromkeys(family.gguf_architecture for family in families if family.gguf_architecture is not None)
    if name not in known:
        raise UnsupportedArchitecture(
            f"{gguf.path}: GGUF architecture {quoted(name)} is not supported; supported: {', '.join(known)}."
        )
    family = next((own for own in families if own.gguf_architecture == name and own.is_in_gguf(gguf)), None)
    if family is None:
        raise UnsupportedArchitecture(f"{gguf.path}: a sliding window is not supported in {quoted(name)}.")
    return family


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
    own = family.keys_from_gguf(gguf)
    _refuse_features(gguf, name, own, head_dim, context_length)
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
        family.activation_key: next(iter(family.activations)),
        "max_position_embeddings": context_length,
        "rms_norm_eps": gguf.require(f"{name}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": gguf.tensors[embedding].shape[0],
        "tie_word_embeddings": f"{tensors.head}.weight" not in gguf.tensors,
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id", int),
        "use_cache": True,
        "dtype": "bfloat16",
    }
    config |= own
    config |= family.rope_keys_from_gguf(gguf, rope_theta(gguf, name), rope_scaling(gguf, name, head_dim))
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


def _refuse_features(
    gguf: GgufFile, name: str, own_keys: Mapping[str, object], head_dim: int, context_length: int
) -> None:
    """Refuses what would be ignored: features that neither all families have nor are among the family's own keys."""
    if gguf.get(f"{name}.expert_count", int) and "num_experts" not in own_keys:
        raise UnsupportedArchitecture(f"{gguf.path}: mixtures of experts are not supported in {quoted(name)}.")
    if (gguf.get(f"{name}.attention.value_length", int) or head_dim) != head_dim:
        raise UnsupportedArchitecture(f"{gguf.path}: keys and values of different sizes are not supported.")
    num_rotated = gguf.get(f"{name}.rope.dimension_count", int) or head_dim
    if num_rotated != head_dim and "partial_rotary_factor" not in own_keys:
        raise UnsupportedArchitecture(f"{gguf.path}: partial rotary embeddings are not supported.")
    window = gguf.get(f"{name}.attention.sliding_window", int)
    if window and window < context_length and "sliding_window" not in own_keys:
        raise UnsupportedArchitecture(
            f"{gguf.path}: a GGUF file does not say which layers its sliding window applies to; "
            "use the model's Hugging Face folder."
        )
