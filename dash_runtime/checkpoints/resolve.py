"""Finds the local Hugging Face folder of the model that a user names.

Reads no environment variables and prints nothing: the caller is told of progress, one sentence at a time.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dash_runtime.checkpoints.cached_config import cached_model_config
from dash_runtime.checkpoints.conversion_cache import ConversionSource, cached_conversion
from dash_runtime.checkpoints.embedded import EMBEDDED_NAME, EMBEDDED_SHA256, embedded_gguf
from dash_runtime.checkpoints.gguf_config import config_keys, gguf_family
from dash_runtime.checkpoints.gguf_conversion import convert_gguf
from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.gguf_shards import gguf_model
from dash_runtime.checkpoints.hf_config import parse_model_config
from dash_runtime.checkpoints.hf_folder import check_folder
from dash_runtime.checkpoints.hub import download_snapshot, is_hub_id
from dash_runtime.checkpoints.manifest import find_damage, read_manifest
from dash_runtime.errors import CheckpointError, CheckpointNotFound, ConfigError, CorruptCheckpoint, DashRuntimeError
from dash_runtime.model_config import ModelConfig
from dash_runtime.progress import Progress

EMBEDDED = "embedded"
CONVERSION_VERSION = 1
"""Increased whenever a conversion's result changes, so that older conversions are made again."""

_KEY_DIGITS = 12


def resolve_checkpoint(
    model: str, revision: str | None, cache_folder: Path, progress: Progress = lambda message: None
) -> Path:
    """Returns the Hugging Face folder of `model`, which is converted or downloaded if needed.

    Args:
        model: `embedded`, a Hugging Face folder, a `.gguf` file (of a split model, any of its files), or a hub id
            (`organisation/name`).
        revision: a branch, tag or commit of a hub id; None for the default.
        cache_folder: the folder of conversions; made when it is needed.
        progress: called with a sentence before every step that takes seconds.

    Raises:
        CheckpointNotFound: there is no such model.
        CorruptCheckpoint: a file is damaged.
        UnsupportedArchitecture: a GGUF file of a kind that is not supported.
        CheckpointError: the folder lacks a file, or cannot be written or downloaded.
        ConfigError: `model` is empty, or a revision was given for something that is not on the hub.
    """
    if not model:
        raise ConfigError("model", "must not be empty")
    path = Path(model)
    is_local = model == EMBEDDED or path.exists() or not is_hub_id(model)
    if is_local and revision is not None:
        raise ConfigError("revision", f"applies to hub ids only, and {model!r} is local")
    convert = partial(convert_gguf, progress=progress)
    if model == EMBEDDED:
        source = _source(EMBEDDED_NAME, f"sha256:{EMBEDDED_SHA256}", embedded_gguf)
        return cached_conversion(source, cache_folder, convert, progress)
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix == ".gguf":
        return cached_conversion(_gguf_source(path), cache_folder, partial(convert, copies_weights=False), progress)
    if path.exists():
        raise CheckpointError(f"{path} is neither a folder nor a .gguf file.")
    if is_local:
        raise CheckpointNotFound(
            f"There is no {model!r}: a model is {EMBEDDED!r}, a folder, a .gguf file, or a hub id (organisation/name)."
        )
    progress(f"fetching {model} from the hub")
    return _checked_folder(download_snapshot(model, revision))


def described_model(model: str, cache_folder: Path) -> ModelConfig | None:
    """Returns the configuration of a folder or a GGUF file without reading its weights.

    None if it cannot be had: `resolve_checkpoint` says why.
    """
    path = embedded_gguf() if model == EMBEDDED else Path(model)
    try:
        if path.is_dir():
            return cached_model_config(path, cache_folder)
        if path.suffix != ".gguf":
            return None
        gguf = GgufFile(path)
        return parse_model_config(config_keys(gguf, gguf_family(gguf)), path.stem, path)
    except DashRuntimeError:
        return None


def _checked_folder(folder: Path) -> Path:
    manifest = read_manifest(folder)
    damage = None if manifest is None else find_damage(folder, manifest)
    if damage is not None:
        raise CorruptCheckpoint(f"{damage}; delete the folder {folder}.")
    check_folder(folder)
    return folder


def _gguf_source(path: Path) -> ConversionSource:
    """Identifies a user's files by path, size and time: hashing gigabytes at every start is too slow."""
    name, paths = gguf_model(path)
    missing = next((own for own in paths if not own.is_file()), None)
    if missing is not None:
        parts = "" if len(paths) == 1 else f" The model is in {len(paths)} files, and needs all."
        raise CheckpointNotFound(f"There is no file {missing}.{parts}")
    statuses = [(own.resolve(), own.stat()) for own in paths]
    identity = ":".join(f"{own}:{status.st_size}:{status.st_mtime_ns}" for own, status in statuses)
    return _source(name, identity, lambda: paths[0])


def _source(name: str, identity: str, locate: Callable[[], Path]) -> ConversionSource:
    key = hashlib.sha256(f"{CONVERSION_VERSION}:{identity}".encode()).hexdigest()[:_KEY_DIGITS]
    return ConversionSource(name, identity, f"{name}-{key}", locate)
