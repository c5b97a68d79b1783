"""Writes files atomically. Imports no torch; knows nothing of what is written."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a partial file to write to. Afterwards it replaces `path` in one rename, or is removed if that fails.

    Raises:
        OSError: the file cannot be replaced; the old one is intact.
    """
    # Containers that share a folder have the same process ids.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def require_regular_file(path: Path) -> int:
    """Returns the size of a regular file in bytes. Opening a pipe or a device instead could wait for ever.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is no regular file, with a `strerror` that says so.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return status.st_size
