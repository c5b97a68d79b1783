"""Reads what the system says of this machine's processor."""

from collections.abc import Sequence
from pathlib import Path


def first_processor() -> Sequence[str]:
    """Returns the lines about the first processor, such as its features and caches; none where there are none."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return ()
