"""Reads a Hugging Face config.json as a `ModelConfig`, or says by name what is not supported.

The defaults and the older spellings of a key are transformers' (AutoConfig); code from a checkpoint is never run. What
differs between model families is asked of the family. Knows no weights.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dash_runtime.checkpoints.manifest import read_manifest
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families import FAMILIES, Family
from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.files.json_file import read_json_object
from dash_runtime.files.wording import one_line, quoted
from dash_runtime.model_config import ModelConfig

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
MAX_LAYERS = 4096
"""Some thirty times the layers of the deepest model of these families. A damaged file may ask for billions."""
MAX_CONTEXT_LENGTH = 2**24
"""More than any model has; the longest contexts have ten million positions."""

_LABELS = ("num_labels", "id2label", "label2id")
"""A classifier's keys, which transformers makes a table of; no decoder has them."""


def load_model_config(folder: Path, name: str | None = None, families: Sequence[Family] = FAMILIES) -> ModelConfig:
    """Reads the configuration of the model in `folder`.

    Args:
        folder: holds config.json and, often, generation_config.json.
        name: the model's name; None derives it from the folder's path.
        families: the model families that are supported.

    Raises:
        CheckpointNotFound: the folder or its config.json is missing.
        CorruptCheckpoint: a file is not valid JSON, or a value makes no sense.
        UnsupportedArchitecture: there is no decoder for this architecture, or for a feature of it.
    """
    if not folder.is_dir():
        raise CheckpointNotFound(f"There is no folder {folder}.")
    file = folder / CONFIG_FILE
    config = parse_model_config(read_json_object(file), name or model_name(folder), file, families)
    generation = folder / GENERATION_CONFIG_FILE
    eos = read_json_object(generation).get("eos_token_id") if os.path.lexists(generation) else None
    return config if eos is None else replace(config, eos_token_ids=_token_ids(eos, config.vocab_size, generation))


def model_name(folder: Path) -> str:
    """Returns the manifest's name, the hub id of a folder in the hub's cache, or else the folder's name."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest.name
    folder = folder.absolute()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def parse_model_config(
    raw: Mapping[str, Any], name: str, source: Path, families: Sequence[Family] = FAMILIES
) -> ModelConfig:
    """Returns the configuration that the keys of a config.json describe; `source` is the file to name in errors.

    Raises:
        CorruptCheckpoint: a value makes no sense.
        UnsupportedArchitecture: there is no decoder for this architecture, or for a feature of it.
    """
    family = _family(raw, source, families)
    if raw.get("quantization_config"):
        raise UnsupportedArchitecture(
            f"{source}: the checkpoint is quantised already; use the one in bfloat16, "
            "which is quantised here when it is loaded."
        )
    config = ConfigReader(_transformers_config(raw, family.model_type, source), source)
    block = family.block(config)
    num_heads, num_kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{source}: {num_heads} heads cannot share {num_kv_heads} key-value heads.")
    hidden_size, vocab_size = config.size("hidden_size"), config.size("vocab_size")
    head_dim = config.head_dim()
    if head_dim % 2 or not head_dim:
        raise CorruptCheckpoint(f"{source}: heads of {head_dim} channels cannot be rotated in pairs.")
    eps = config.number("rms_norm_eps")
    if eps >= 1:
        raise CorruptCheckpoint(f"{source}: rms_norm_eps must be below 1, got {eps:g}.")
    context_length = config.size("max_position_embeddings")
    if not 2 <= context_length <= MAX_CONTEXT_LENGTH:
        raise CorruptCheckpoint(
            f"{source}: a context of {context_length} tokens is too short for an answer, or longer than any model's."
        )
    return ModelConfig(
        name=name,
        architecture=family.architecture,
        num_layers=config.size("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("intermediate_size"),
        vocab_size=vocab_size,
        rms_norm_eps=eps,
        context_length=context_length,
        block=block,
        ropes=family.ropes(config),
        # A window as long as the context hides nothing, and layers without one take larger steps.
        sliding_window=tuple(
            None if own is None or own >= context_length else own for own in family.sliding_window(config)
        ),
        has_tied_head=config.flag("tie_word_embeddings"),
        eos_token_ids=_token_ids(config.get("eos_token_id"), vocab_size, source),
        embedding_multiplier=family.embedding_multiplier(config),
        logits_multiplier=family.logits_multiplier(config),
        tensor_names=family.tensor_names,
        mixture=family.mixture(config),
    )


def _family(raw: Mapping[str, Any], source: Path, families: Sequence[Family]) -> Family:
    model_type = raw.get("model_type")
    names = raw.get("architectures")
    if not names:
        names = [family.architecture for family in families if family.model_type == model_type] or [model_type]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CorruptCheckpoint(f"{source} names no architecture.")
    by_name = {family.architecture: family for family in families}
    family = by_name.get(names[0])
    if family is None:
        raise UnsupportedArchitecture(
            f"{source}: architecture {one_line(names[0])} is not supported; supported: {', '.join(by_name)}."
        )
    if model_type != family.model_type:
        raise CorruptCheckpoint(f"{source}: architecture {names[0]} does not go with model_type {quoted(model_type)}.")
    return family


def _transformers_config(raw: Mapping[str, Any], model_type: str, source: Path) -> Any:
    """Returns a `PretrainedConfig`."""
    from transformers import AutoConfig

    num_layers = raw.get("num_hidden_layers")
    if isinstance(num_layers, (int, float)) and num_layers > MAX_LAYERS:  # transformers makes a list of them
        raise CorruptCheckpoint(f"{source}: {quoted(num_layers)} layers are more than any model has.")
    kind = type(AutoConfig.for_model(model_type))
    try:
        return kind.from_dict({key: value for key, value in raw.items() if key not in _LABELS})
    except Exception as error:
        # transformers raises whatever a wrong value leads to: KeyError, TypeError, its validation errors.
        raise CorruptCheckpoint(f"{source} cannot be used: {one_line(error) or type(error).__name__}") from None


def _token_ids(value: object, vocab_size: int, source: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise CorruptCheckpoint(f"{source}: eos_token_id must be token ids, got {quoted(value)}.")
    if ids and max(ids) >= vocab_size:
        raise CorruptCheckpoint(f"{source}: eos_token_id {max(ids)} is outside its vocabulary of {vocab_size}.")
    return frozenset(ids)
