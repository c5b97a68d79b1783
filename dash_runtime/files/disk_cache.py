"""Writes files that later starts read: their names tell what they depend on.

Imports no torch and reads no environment of its own; knows nothing of what is written.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from dash_runtime.files.atomic_file import replacing


def default_cache_folder(environment: Mapping[str, str]) -> Path:
    """Returns `dash-llm` in the user's cache folder, which is $XDG_CACHE_HOME or ~/.cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash-llm"


def digest(key: object) -> str:
    """Returns 16 digits that differ if `key` has another `repr`."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Writes `path` in one rename. If the folder cannot be written to, the next start only takes longer."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            write(partial)
