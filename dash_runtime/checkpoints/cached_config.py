"""A model's configuration as it was read by an earlier start.

It is read with transformers, which takes seconds to import and 80 MB for as long as the process lives. Knows files of
a checkpoint and of the cache; knows no keys.
"""

import os
from importlib.metadata import version
from pathlib import Path

import msgspec

from dash_runtime import model_config
from dash_runtime.checkpoints import hf_config
from dash_runtime.checkpoints.hf_config import CONFIG_FILE, GENERATION_CONFIG_FILE, load_model_config, model_name
from dash_runtime.errors import DashRuntimeError
from dash_runtime.files.disk_cache import digest, keep
from dash_runtime.files.json_file import read_text
from dash_runtime.model_config import ModelConfig


def cached_model_config(folder: Path, cache_folder: Path) -> ModelConfig:
    """`load_model_config`, from `cache_folder` where the same code has read the same files before.

    Raises:
        DashRuntimeError: as `load_model_config`.
    """
    try:
        kept = cache_folder / "configurations" / f"{_digest(folder)}.json"
    except DashRuntimeError:
        return load_model_config(folder)  # which says what is wrong
    try:
        return msgspec.json.decode(kept.read_bytes(), type=ModelConfig)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        config = load_model_config(folder)
    keep(kept, lambda partial: partial.write_bytes(msgspec.json.encode(config)))
    return config


def _digest(folder: Path) -> str:
    """Of all that a configuration depends on."""
    code = [Path(str(module.__file__)).read_text() for module in (hf_config, model_config)]
    key = (model_name(folder), read_text(folder / CONFIG_FILE), _generation_config(folder), code)
    return digest((*key, version("transformers")))


def _generation_config(folder: Path) -> str | None:
    path = folder / GENERATION_CONFIG_FILE
    return read_text(path) if os.path.lexists(path) else None
