"""Remembers which files were read whole and found good, so that later starts need not read them again.

As git does, it trusts a file whose size, times and inode are as they were. Imports no torch; knows nothing of what is
checked.
"""

import time
from collections.abc import Callable
from pathlib import Path

from dash_runtime.files.disk_cache import keep

_YOUNG_SECONDS = 1.0
"""What is done to so young a file may leave its change time as it is: some clocks of file systems are so coarse."""
_LEAST_BYTES = 1 << 20


def fault_of(
    path: Path, find_fault: Callable[[], str | None], against: str = "", clock: Callable[[], float] = time.time
) -> str | None:
    """Returns what `find_fault` finds wrong with the file, or None.

    A file without fault is not looked at again until anything was done to it, or it is held `against` another text.
    One that is small, or whose folder cannot be written to, is looked at every time.

    Raises:
        OSError: there is no such file.
    """
    state = _state(path, against)
    note = path.with_name(f".{path.name}.checked")
    try:
        if note.read_text(encoding="utf-8") == state:
            return None
    except (OSError, ValueError):  # nobody checked it yet
        pass
    fault = find_fault()
    status = path.stat()
    if fault is None and status.st_size >= _LEAST_BYTES and clock() - status.st_ctime > _YOUNG_SECONDS:
        keep(note, lambda partial: partial.write_text(state, encoding="utf-8"))
    return fault


def _state(path: Path, against: str) -> str:
    """Returns a text that differs once anything was done to the file."""
    status = path.stat()
    return f"{against} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
