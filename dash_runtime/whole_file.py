"""Files that are whole or not there. Imports no torch; knows nothing of what is written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A partial file beside `path` to write to, which takes its place in one rename, or is removed where that fails.

    Raises:
        OSError: the file cannot take its place; what was there before is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
