"""Turns a Hugging Face config.json into a `ModelConfig`, or says by name what is not supported.

The defaults and the older spellings of a key are transformers' (AutoConfig); code from a checkpoint is
never run. Knows no weights.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dash_runtime.checkpoints.manifest import read_manifest
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.json_file import read_json_object
from dash_runtime.files.wording import one_line, quoted
from dash_runtime.model_config import BlockConfig, ModelConfig, QkNorm, RopeConfig, RopeKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
MAX_LAYERS = 4096
"""Some thirty times the most of any model of these families. Damage may ask for billions, and lists as long."""
MAX_CONTEXT_LENGTH = 2**24
"""Above that of any model; the longest have ten million positions."""

_MAX_NUMBER = 1e30
_LABELS = ("num_labels", "id2label", "label2id")
"""A classifier's, which transformers makes a table of; no decoder has them."""


def load_model_config(folder: Path, name: str | None = None) -> ModelConfig:
    """The shape of the model in `folder`.

    Args:
        folder: holds config.json and, often, generation_config.json.
        name: what to call the model; None derives it from where the folder lies.

    Raises:
        CheckpointNotFound: the folder or its config.json is missing.
        CorruptCheckpoint: a file is not valid JSON, or a value makes no sense.
        UnsupportedArchitecture: there is no decoder for this architecture, or for a feature of it.
    """
    if not folder.is_dir():
        raise CheckpointNotFound(f"There is no folder {folder}.")
    file = folder / CONFIG_FILE
    config = parse_model_config(read_json_object(file), name or model_name(folder), file)
    generation = folder / GENERATION_CONFIG_FILE
    if not os.path.lexists(generation):
        return config
    eos = read_json_object(generation).get("eos_token_id")
    if eos is None:
        return config
    return replace(config, eos_token_ids=_token_ids(eos, config.vocab_size, generation))


def model_name(folder: Path) -> str:
    """The manifest's name, the hub id of a folder in the hub's cache, or else the folder's name."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest.name
    folder = folder.absolute()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def parse_model_config(raw: Mapping[str, Any], name: str, source: Path) -> ModelConfig:
    """The shape that the keys of a config.json describe; `source` is the file to name in errors.

    Raises:
        CorruptCheckpoint: a value makes no sense.
        UnsupportedArchitecture: there is no decoder for this architecture, or for a feature of it.
    """
    architecture = _architecture(raw, source)
    if raw.get("quantization_config"):
        raise UnsupportedArchitecture(
            f"{source}: the checkpoint is quantised already; use the one in bfloat16, "
            "which is quantised here when it is loaded."
        )
    config = _transformers_config(raw, architecture, source)
    if config.hidden_act != "silu":
        raise UnsupportedArchitecture(
            f"{source}: activation {quoted(config.hidden_act)} is not supported; only silu is."
        )
    num_heads = _size(config, "num_attention_heads", source)
    num_kv_heads = _size(config, "num_key_value_heads", source)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{source}: {num_heads} heads cannot share {num_kv_heads} key-value heads.")
    hidden_size, vocab_size = _size(config, "hidden_size", source), _size(config, "vocab_size", source)
    has_attention_bias = _flag(config, "attention_bias", source)
    head_dim = hidden_size // num_heads
    if getattr(config, "head_dim", None) is not None:
        head_dim = _size(config, "head_dim", source)
    if head_dim % 2 or not head_dim:
        raise CorruptCheckpoint(f"{source}: heads of {head_dim} channels cannot be rotated in pairs.")
    eps = _number(config.rms_norm_eps, "rms_norm_eps", source)
    if eps >= 1:
        raise CorruptCheckpoint(f"{source}: rms_norm_eps must be below 1, got {eps:g}.")
    context_length = _size(config, "max_position_embeddings", source)
    if not 2 <= context_length <= MAX_CONTEXT_LENGTH:
        raise CorruptCheckpoint(
            f"{source}: a context of {context_length} tokens is too short for an answer, or longer than any model's."
        )
    return ModelConfig(
        name=name,
        architecture=architecture,
        num_layers=_size(config, "num_hidden_layers", source),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_size(config, "intermediate_size", source),
        vocab_size=vocab_size,
        rms_norm_eps=eps,
        context_length=context_length,
        block=BlockConfig(
            qk_norm=QkNorm.HEAD if architecture == "Qwen3ForCausalLM" else None,
            has_qkv_bias=architecture == "Qwen2ForCausalLM" or has_attention_bias,
            has_output_bias=architecture != "Qwen2ForCausalLM" and has_attention_bias,
            has_mlp_bias=_flag(config, "mlp_bias", source),
        ),
        ropes=(_rope(config, source),) * _size(config, "num_hidden_layers", source),
        has_tied_head=_flag(config, "tie_word_embeddings", source),
        sliding_window=_sliding_window(config, architecture, source),
        eos_token_ids=_token_ids(config.eos_token_id, vocab_size, source),
    )


def _architecture(raw: Mapping[str, Any], source: Path) -> str:
    model_type = raw.get("model_type")
    names = raw.get("architectures")
    if not names:
        names = [known for known, known_type in MODEL_TYPES.items() if known_type == model_type] or [model_type]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CorruptCheckpoint(f"{source} names no architecture.")
    if names[0] not in MODEL_TYPES:
        raise UnsupportedArchitecture(
            f"{source}: architecture {one_line(names[0])} is not supported; supported: {', '.join(MODEL_TYPES)}."
        )
    if model_type != MODEL_TYPES[names[0]]:
        raise CorruptCheckpoint(f"{source}: architecture {names[0]} does not go with model_type {quoted(model_type)}.")
    return names[0]


def _transformers_config(raw: Mapping[str, Any], architecture: str, source: Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    num_layers = raw.get("num_hidden_layers")
    if isinstance(num_layers, (int, float)) and num_layers > MAX_LAYERS:  # transformers makes a list of them
        raise CorruptCheckpoint(f"{source}: {quoted(num_layers)} layers are more than any model has.")
    kind = type(AutoConfig.for_model(MODEL_TYPES[architecture]))
    try:
        return kind.from_dict({key: value for key, value in raw.items() if key not in _LABELS})
    except Exception as error:
        # transformers raises whatever a wrong value leads to: KeyError, TypeError, its validation errors.
        raise CorruptCheckpoint(f"{source} cannot be used: {one_line(error) or type(error).__name__}") from None


def _size(config: "PretrainedConfig", key: str, source: Path) -> int:
    value = getattr(config, key)
    if type(value) is not int or value < 1:
        raise CorruptCheckpoint(f"{source}: {key} must be a positive integer, got {quoted(value)}.")
    return value


def _flag(config: "PretrainedConfig", key: str, source: Path) -> bool:
    """False where the architecture has no such key."""
    value = getattr(config, key, None)
    if value is None:
        return False
    if type(value) is not bool:
        raise CorruptCheckpoint(f"{source}: {key} must be true or false, got {quoted(value)}.")
    return value


def _number(value: object, key: str, source: Path) -> float:
    """A positive number."""
    if type(value) not in (int, float) or not 0 < cast(float, value) < _MAX_NUMBER:
        raise CorruptCheckpoint(f"{source}: {key} must be a positive number, got {quoted(value)}.")
    return float(cast(float, value))


def _token_ids(value: object, vocab_size: int, source: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise CorruptCheckpoint(f"{source}: eos_token_id must be token ids, got {quoted(value)}.")
    if ids and max(ids) >= vocab_size:
        raise CorruptCheckpoint(f"{source}: eos_token_id {max(ids)} is outside its vocabulary of {vocab_size}.")
    return frozenset(ids)


def _rope(config: "PretrainedConfig", source: Path) -> RopeConfig:
    parameters = config.rope_parameters
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedArchitecture(f"{source}: rotary embeddings that differ between layers are not supported.")
    try:
        kind = RopeKind(parameters["rope_type"])
    except ValueError:
        supported = ", ".join(RopeKind)
        raise UnsupportedArchitecture(
            f"{source}: rotary scaling {quoted(parameters['rope_type'])} is not supported; supported: {supported}."
        ) from None
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture(f"{source}: partial rotary embeddings are not supported.")

    def number(key: str) -> float:
        return _number(parameters.get(key), f"{key} of its rotary embedding", source)

    theta = number("rope_theta")
    if kind is RopeKind.DEFAULT:
        return RopeConfig(theta)
    if kind is RopeKind.LINEAR:
        return RopeConfig(theta, kind, number("factor"))
    rope = RopeConfig(
        theta=theta,
        kind=kind,
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_context_length=int(number("original_max_position_embeddings")),
    )
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise CorruptCheckpoint(f"{source}: low_freq_factor of its rotary embedding is not below high_freq_factor.")
    return rope


def _sliding_window(config: "PretrainedConfig", architecture: str, source: Path) -> tuple[int | None, ...]:
    num_layers = _size(config, "num_hidden_layers", source)
    if architecture == "LlamaForCausalLM" or config.sliding_window is None:
        return (None,) * num_layers
    window = _size(config, "sliding_window", source)
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    windows = {"sliding_attention": window, "full_attention": None}
    if len(config.layer_types) != num_layers or any(kind not in [*windows] for kind in config.layer_types):
        raise UnsupportedArchitecture(f"{source}: layer_types other than {', '.join(windows)} are not supported.")
    return tuple(windows[kind] for kind in config.layer_types)
