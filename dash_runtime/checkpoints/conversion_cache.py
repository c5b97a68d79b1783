"""Caches converted models: each is made once, completely or not at all, by one process at a time.

A conversion is written into a folder beside its target. When everything is on disk, the folder is renamed. A lock file
makes a second process wait; the kernel releases it when its holder dies. The holder may delete the leftovers of an
interrupted conversion. Knows nothing of GGUF.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dash_runtime.checkpoints.manifest import MANIFEST_FILE, find_damage, read_manifest, write_manifest
from dash_runtime.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from dash_runtime.progress import Progress


@dataclass(frozen=True, slots=True)
class ConversionSource:
    """A model to convert. `locate` finds its file, and may raise; it is not called if the conversion is cached."""

    name: str
    identity: str
    """A text that differs whenever the file's contents do."""
    folder_name: str
    locate: Callable[[], Path]


def cached_conversion(
    source: ConversionSource, cache_folder: Path, convert: Callable[[Path, Path], None], progress: Progress
) -> Path:
    """Returns the folder of the converted `source`. If it is missing or damaged, `convert(file, folder)` makes it.

    Raises:
        CheckpointNotFound: there is nothing to convert.
        CorruptCheckpoint: the converted folder is damaged and its source is gone.
        CheckpointError: the cache folder cannot be written, or `convert` raised it.
    """
    target = cache_folder / source.folder_name
    try:
        damage = _damage(target, source)
        if damage is None:
            return target
        try:
            file = source.locate()
        except CheckpointNotFound as error:
            if not os.path.lexists(target):
                raise
            raise CorruptCheckpoint(f"{damage}; delete the folder {target} ({error})") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            damage = _damage(target, source)
            if damage is None:  # another process was faster
                return target
            if os.path.lexists(target):
                progress(f"{damage}; converting {file.name} again")
            _replace(target, source, lambda folder: convert(file, folder))
        return target
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{source.name} cannot be converted into {target}: {reason}.") from None


def _damage(target: Path, source: ConversionSource) -> str | None:
    """Returns the reason why `target` cannot be used as it is, or None."""
    try:
        manifest = read_manifest(target)
    except (CheckpointNotFound, CorruptCheckpoint) as error:
        return str(error).rstrip(".")
    if manifest is None:
        return f"{target} is no complete conversion of {source.name}: it has no {MANIFEST_FILE}"
    if (manifest.name, manifest.source) != (source.name, source.identity):
        return f"{target} is no conversion of {source.name}: its {MANIFEST_FILE} names another"
    return find_damage(target, manifest)


def _replace(target: Path, source: ConversionSource, fill: Callable[[Path], None]) -> None:
    """Makes `target` anew. The caller must hold its lock."""
    prefix = f".{target.name}.partial-"
    _delete_leftovers(target.parent, prefix)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        fill(partial)
        write_manifest(partial, source.name, source.identity)
        partial.chmod(0o755)  # mkdtemp's folders are private; a cache may be shared
        for file in (*partial.iterdir(), partial):
            _sync(file)
        if os.path.lexists(target):
            os.rename(target, partial.with_name(f"{partial.name}-damaged"))
        os.rename(partial, target)
        _sync(target.parent)
    finally:
        _delete_leftovers(target.parent, prefix)


def _delete_leftovers(folder: Path, prefix: str) -> None:
    for leftover in folder.iterdir():
        if leftover.name.startswith(prefix):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
