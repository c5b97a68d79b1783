"""Files that a start keeps for later ones: their names tell what they depend on. Imports no torch; knows nothing of
what is written."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from dash_runtime.files.atomic_file import replacing


def digest(key: object) -> str:
    """16 digits that differ where `key`'s text does."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Writes in one rename; a folder that cannot be written to only costs the next start its time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            write(partial)
