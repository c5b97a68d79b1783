"""Tells whether a measurement ran on a quiet machine: its threads did not wait for cores that others had.

Beside a busy process short steps slip through between two turns, and long ones do not: INT4 then seems to cost half of
what it does. Linux counts how long a thread that could run did not; elsewhere every measurement counts as quiet.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_THREADS = Path("/proc/self/task")
_MOST_WAITING = 0.1
"""On a quiet machine threads wait for less than a hundredth of the time, beside one busy process for a third."""


@dataclass
class Quiet:
    """What `quietness` found, once its block has ended."""

    waited: float = 0.0
    """Seconds that all threads together waited, as a share of the time that the block took."""

    @property
    def is_quiet(self) -> bool:
        return self.waited <= _MOST_WAITING


@contextlib.contextmanager
def quietness(threads: Path = _THREADS) -> Iterator[Quiet]:
    """Watches the block."""
    found = Quiet()
    before, began_at = _waited_seconds(threads), time.monotonic()
    yield found
    found.waited = max(0.0, _waited_seconds(threads) - before) / max(time.monotonic() - began_at, 1e-9)


def _waited_seconds(threads: Path) -> float:
    """Returns how long this process's threads have waited for a core so far: the second figure of `schedstat`."""
    total = 0
    for file in threads.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
            total += int(file.read_text().split()[1])
    return total / 1e9
