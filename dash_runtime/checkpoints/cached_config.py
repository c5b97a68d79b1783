"""Caches a model's configuration on disk for later starts.

Reading it anew needs transformers, which takes seconds to import and 80 MB while the process lives. Knows a
checkpoint's files and the cache's; knows no keys.
"""

import os
from importlib.metadata import version
from pathlib import Path

import msgspec

from dash_runtime import families, model_config
from dash_runtime.checkpoints import hf_config
from dash_runtime.checkpoints.hf_config import CONFIG_FILE, GENERATION_CONFIG_FILE, load_model_config, model_name
from dash_runtime.errors import DashRuntimeError
from dash_runtime.files.disk_cache import digest, keep
from dash_runtime.files.json_file import read_text
from dash_runtime.model_config import ModelConfig


def cached_model_config(folder: Path, cache_folder: Path) -> ModelConfig:
    """Returns `load_model_config(folder)`, from `cache_folder` if the same code has read the same files before.

    Raises:
        DashRuntimeError: as `load_model_config`.
    """
    try:
        cached = cache_folder / "configurations" / f"{_digest(folder)}.json"
    except DashRuntimeError:
        return load_model_config(folder)  # says what is wrong
    try:
        return msgspec.json.decode(cached.read_bytes(), type=ModelConfig)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        config = load_model_config(folder)
    keep(cached, lambda partial: partial.write_bytes(msgspec.json.encode(config)))
    return config


def _digest(folder: Path) -> str:
    """Returns a digest of everything that a configuration depends on."""
    sources = [Path(str(module.__file__)) for module in (hf_config, model_config)]
    sources += sorted(Path(str(families.__file__)).parent.glob("*.py"))
    code = [source.read_text() for source in sources]
    path = folder / GENERATION_CONFIG_FILE
    generation = read_text(path) if os.path.lexists(path) else None
    return digest((model_name(folder), read_text(folder / CONFIG_FILE), generation, code, version("transformers")))
