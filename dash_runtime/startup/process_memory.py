"""The memory of a process that has loaded its model, made as small as it is and as fast to read as it can be.

A token reads all weights once. In pages of 4 KB each page costs a walk of the page tables, which in a virtual machine
are two; in pages of 2 MB decoding is about a tenth faster. Linux gives those to whoever asks. Knows pages; knows
nothing of what is in them.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUGE_PAGE = 1 << 21
_MAPS = Path("/proc/self/maps")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COLLAPSE = 25
"""MADV_COLLAPSE, since Linux 6.1: at once. What is only advised is done by and by, in the background."""
_LEAST_RESIDENT = 0.75
"""A huge page is resident as a whole: of one that is mostly empty, as a thread's stack is, nothing would be gained."""


def settle_memory() -> None:
    """Returns to the system what is free, where the C library is glibc, and moves all else that is the process's own
    into huge pages, on Linux where these are enabled. What cannot be done stays as it was."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    if not sys.platform.startswith("linux") or not are_enabled(_ENABLED):
        return
    for first, last in private_ranges(_MAPS.read_text()):
        for page in range(first, last, HUGE_PAGE):
            if _resident_share(library, page) >= _LEAST_RESIDENT:
                _advise(library, page, mmap.MADV_HUGEPAGE)
                _advise(library, page, _COLLAPSE)


def are_enabled(file: Path) -> bool:
    """Whether the system gives huge pages to whoever asks; `file` names all choices and brackets its own. MADV_COLLAPSE
    would take no notice of it."""
    try:
        return "[never]" not in file.read_text()
    except OSError:
        return False


def private_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """First and last address of the whole huge pages in each writable piece of memory without a file, from the text of
    `/proc/PID/maps`."""
    for line in maps.splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if permissions != "rw-p" or path not in ([], ["[heap]"]):
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if first < last:
            yield first, last


def _resident_share(library: Any, page: int) -> float:
    states = (ctypes.c_ubyte * (HUGE_PAGE // mmap.PAGESIZE))()
    if library.mincore(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE), states):
        return 0.0
    return sum(state & 1 for state in states) / len(states)


def _advise(library: Any, page: int, advice: int) -> None:
    library.madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE), advice)
