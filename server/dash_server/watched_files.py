"""Tells when files have changed. Knows no contents."""

import time
from collections.abc import Callable
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 1.0


class WatchedFiles:
    """Checks files when asked, at most once a second. Reports each change once."""

    def __init__(self, *paths: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Ignores paths that are None."""
        self._paths = [path for path in paths if path is not None]
        self._clock = clock
        self._looked_at = clock()
        self._stamps = self._look()

    def have_changed(self) -> bool:
        """True if a file was changed, replaced or removed since the last look."""
        now = self._clock()
        if now - self._looked_at < _SECONDS_BETWEEN_LOOKS:
            return False
        self._looked_at = now
        before, self._stamps = self._stamps, self._look()
        return before != self._stamps

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
