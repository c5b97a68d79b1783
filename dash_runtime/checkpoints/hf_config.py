"""Turns a Hugging Face config.json into a `ModelConfig`, or says by name what is not supported.

The defaults and the older spellings of a key are transformers' (AutoConfig); code from a checkpoint is
never run. Knows no weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_runtime.checkpoints.json_file import read_json_object
from dash_runtime.checkpoints.manifest import read_manifest
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.model_config import ModelConfig, RopeConfig, RopeKind

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
    if not generation.exists():
        return config
    eos = read_json_object(generation).get("eos_token_id")
    if eos is None:
        return config
    return replace(config, eos_token_ids=_token_ids(eos, generation))


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
        raise UnsupportedArchitecture(f"{source}: activation {config.hidden_act!r} is not supported; only silu is.")
    num_heads = _size(config, "num_attention_heads", source)
    num_kv_heads = _size(config, "num_key_value_heads", source)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{source}: {num_heads} heads cannot share {num_kv_heads} key-value heads.")
    hidden_size = _size(config, "hidden_size", source)
    has_attention_bias = bool(getattr(config, "attention_bias", False))
    head_dim = getattr(config, "head_dim", None)
    return ModelConfig(
        name=name,
        architecture=architecture,
        num_layers=_size(config, "num_hidden_layers", source),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads if head_dim is None else _size(config, "head_dim", source),
        intermediate_size=_size(config, "intermediate_size", source),
        vocab_size=_size(config, "vocab_size", source),
        rms_norm_eps=float(config.rms_norm_eps),
        context_length=_size(config, "max_position_embeddings", source),
        rope=_rope(config, source),
        has_qkv_bias=architecture == "Qwen2ForCausalLM" or has_attention_bias,
        has_output_bias=architecture != "Qwen2ForCausalLM" and has_attention_bias,
        has_mlp_bias=bool(getattr(config, "mlp_bias", False)),
        has_qk_norm=architecture == "Qwen3ForCausalLM",
        has_tied_head=bool(config.tie_word_embeddings),
        sliding_window=_sliding_window(config, architecture, source),
        eos_token_ids=_token_ids(config.eos_token_id, source),
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
            f"{source}: architecture {names[0]} is not supported; supported: {', '.join(MODEL_TYPES)}."
        )
    if model_type != MODEL_TYPES[names[0]]:
        raise CorruptCheckpoint(f"{source}: architecture {names[0]} does not go with model_type {model_type!r}.")
    return names[0]


def _transformers_config(raw: Mapping[str, Any], architecture: str, source: Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    kind = type(AutoConfig.for_model(MODEL_TYPES[architecture]))
    try:
        return kind.from_dict(dict(raw))
    except Exception as error:
        # transformers raises whatever a wrong value leads to: KeyError, TypeError, its validation errors.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptCheckpoint(f"{source} cannot be used: {reason}") from None


def _size(config: "PretrainedConfig", key: str, source: Path) -> int:
    value = getattr(config, key)
    if type(value) is not int or value < 1:
        raise CorruptCheckpoint(f"{source}: {key} must be a positive integer, got {value!r}.")
    return value


def _token_ids(value: object, source: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise CorruptCheckpoint(f"{source}: eos_token_id must be token ids, got {value!r}.")
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
            f"{source}: rotary scaling {parameters['rope_type']!r} is not supported; supported: {supported}."
        ) from None
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture(f"{source}: partial rotary embeddings are not supported.")
    try:
        theta = float(parameters["rope_theta"])
        if kind is RopeKind.DEFAULT:
            return RopeConfig(theta)
        if kind is RopeKind.LINEAR:
            return RopeConfig(theta, kind, float(parameters["factor"]))
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_context_length=int(parameters["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"{source}: the rotary parameters are incomplete or wrong ({error}).") from None


def _sliding_window(config: "PretrainedConfig", architecture: str, source: Path) -> tuple[int | None, ...]:
    num_layers = _size(config, "num_hidden_layers", source)
    if architecture == "LlamaForCausalLM" or config.sliding_window is None:
        return (None,) * num_layers
    window = _size(config, "sliding_window", source)
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    windows = {"sliding_attention": window, "full_attention": None}
    if len(config.layer_types) != num_layers or not set(config.layer_types) <= set(windows):
        raise UnsupportedArchitecture(f"{source}: layer_types other than {', '.join(windows)} are not supported.")
    return tuple(windows[kind] for kind in config.layer_types)
