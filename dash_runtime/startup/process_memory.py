"""Shrinks the memory of a process that has loaded its model, and moves it into huge pages.

A token reads all weights once. With pages of 4 KB each page costs a walk of the page tables, two in a virtual machine.
With pages of 2 MB decoding is about a tenth faster. Linux gives them on request. Knows pages; knows nothing of their
contents.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HUGE_PAGE = 1 << 21
_MAPS = Path("/proc/self/maps")
_SMAPS = Path("/proc/self/smaps")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COLLAPSE = 25
"""MADV_COLLAPSE, since Linux 6.1, acts at once. MADV_HUGEPAGE alone is acted on in the background, gradually."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_THREADS = 4
_KERNELS_KEPT = 320
_LARGEST_KEPT = (1 << 31) - 1
_LEAST_RESIDENT = 0.75
"""A huge page is resident as a whole, so a mostly empty one, such as a thread's stack, would only cost memory."""


def settle_memory(*, moves: bool = True) -> None:
    """Returns free memory to the system (with glibc), gives up what only the start needed of libraries, and `moves` the
    rest of the process's own memory into huge pages (on Linux, if enabled). Does nothing where it can do nothing."""
    give_back_memory()
    library = ctypes.CDLL(None)
    if not sys.platform.startswith("linux"):
        return
    for first, last in unchanged_libraries(_SMAPS.read_text()):
        _advise(library, first, last, mmap.MADV_DONTNEED)
    if not moves or not are_enabled(_ENABLED):
        return

    def settle(page: int) -> None:
        if _resident_share(library, page) >= _LEAST_RESIDENT:
            _advise(library, page, page + HUGE_PAGE, mmap.MADV_HUGEPAGE)
            _advise(library, page, page + HUGE_PAGE, _COLLAPSE)

    ranges = private_ranges(_MAPS.read_text())
    pages = [page for first, last in ranges for page in range(first, last, HUGE_PAGE)]
    with ThreadPoolExecutor(_MOST_THREADS) as threads:
        list(threads.map(settle, pages))


def give_back_memory() -> None:
    """Returns free memory to the system (with glibc)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def keep_freed_memory() -> None:
    """Keeps freed memory in the process (with glibc). Batches allocate and free tensors of many megabytes, and having
    their pages from the system anew each time takes as long as computing them."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for threshold in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            library.mallopt(threshold, _LARGEST_KEPT)


def keep_few_kernels() -> None:
    """Bounds how many kernels oneDNN keeps, if it has made none yet. It makes one for each number of rows, and a
    rollout has rows of every number: a thousand kernels take more than a gigabyte."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS_KEPT))


def are_enabled(file: Path) -> bool:
    """Returns True if the system gives huge pages on request. `file` names all choices, with the current one in
    brackets. MADV_COLLAPSE itself would ignore the choice."""
    try:
        return "[never]" not in file.read_text()
    except OSError:
        return False


def private_ranges(maps: str) -> Iterator[tuple[int, int]]:
    """Yields the start and end of the whole huge pages in each writable range without a file, from the text of
    `/proc/PID/maps`."""
    for line in maps.splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if permissions != "rw-p" or path not in ([], ["[heap]"]):
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if first < last:
            yield first, last


def unchanged_libraries(smaps: str) -> Iterator[tuple[int, int]]:
    """Yields the start and end of each range of a library's file that nobody may write to and nobody has, from the text
    of `/proc/PID/smaps`. If its pages are given up, those that are used come back from the file's own memory.

    torch's build for CUDA touches 200 MB of its libraries on a machine without CUDA.
    """
    found: tuple[int, int] | None = None
    for line in smaps.splitlines():
        first, *words = line.split(maxsplit=5)
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            is_library = len(words) == 5 and ".so" in words[4] and words[0] in ("r-xp", "r--p")
            found = (int(start, 16), int(end, 16)) if is_library else None
        elif first == "Anonymous:" and found is not None and words[0] == "0":
            yield found


def _resident_share(library: Any, page: int) -> float:
    states = (ctypes.c_ubyte * (HUGE_PAGE // mmap.PAGESIZE))()
    if library.mincore(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE), states):
        return 0.0
    return sum(state & 1 for state in states) / len(states)


def _advise(library: Any, start: int, end: int, advice: int) -> None:
    library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
