"""Huge pages keep the content, fill nothing that was empty, and take only memory that is the process's own."""

import ctypes
import mmap
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

from dash_runtime.devices.cpu import CpuDevice
from dash_runtime.startup.process_memory import (
    HUGE_PAGE,
    are_enabled,
    private_ranges,
    settle_memory,
    unchanged_libraries,
)

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
NUM_PAGES = 4
HUGE_PAGES_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

MAPS = """\
55d0c0000000-55d0c0800000 rw-p 00000000 00:00 0                          [heap]
7f0000001000-7f0000400000 rw-p 00000000 00:00 0
7f0000800000-7f0000c00000 rw-p 00000000 00:00 0
7f0001000000-7f0001400000 r--p 00000000 00:00 0
7f0002000000-7f0002400000 rw-s 00000000 00:01 1024                       /dev/zero (deleted)
7f0003000000-7f0003400000 rw-p 00000000 08:01 393449                     /usr/lib/a library.so
7f0004000000-7f00041ff000 rw-p 00000000 00:00 0
7ffd00000000-7ffd00400000 rw-p 00000000 00:00 0                          [stack]
"""


def own_memory() -> mmap.mmap:
    """Maps memory with room for `NUM_PAGES` huge pages wherever it begins."""
    return mmap.mmap(-1, (NUM_PAGES + 1) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def num_resident(memory: mmap.mmap) -> int:
    """Returns the number of its small pages that are resident."""
    states = (ctypes.c_ubyte * (len(memory) // mmap.PAGESIZE))()
    first = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(len(memory)), states) == 0
    return sum(state & 1 for state in states)


def kilobytes(field: str) -> int:
    """Returns a figure of the whole process from the kernel."""
    (number,) = re.findall(rf"^{field}: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(number)


def has_huge_pages_at_once() -> bool:
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    return version >= (6, 1) and are_enabled(HUGE_PAGES_ENABLED)


def test_only_whole_huge_pages_of_the_process_itself_are_named() -> None:
    assert [(hex(first), hex(last)) for first, last in private_ranges(MAPS)] == [
        ("0x55d0c0000000", "0x55d0c0800000"),
        ("0x7f0000200000", "0x7f0000400000"),
        ("0x7f0000800000", "0x7f0000c00000"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("always [madvise] never", True), ("[always] madvise never", True), ("always madvise [never]", False)],
)
def test_a_system_without_huge_pages_is_left_alone(tmp_path: Path, text: str, expected: bool) -> None:
    file = tmp_path / "enabled"
    assert not are_enabled(file)
    file.write_text(text + "\n")
    assert are_enabled(file) is expected


@on_linux
@pytest.mark.alone  # it counts on free huge pages
def test_what_is_full_is_moved_and_keeps_its_content() -> None:
    memory = own_memory()
    content = bytes(range(256)) * (len(memory) // 256)
    memory[:] = content
    before = kilobytes("AnonHugePages")
    settle_memory()
    assert memory[:] == content
    if has_huge_pages_at_once():
        assert kilobytes("AnonHugePages") - before >= HUGE_PAGE // 1024  # as many as fit
    memory.close()


@on_linux
def test_what_is_mostly_empty_stays_so() -> None:
    memory = own_memory()
    memory[:: HUGE_PAGE // 4] = b"x" * (4 * (NUM_PAGES + 1))
    before = num_resident(memory)
    settle_memory()
    assert num_resident(memory) == before  # all of it if huge pages are always given


@on_linux
@pytest.mark.alone  # it counts on free huge pages
def test_a_cache_takes_no_room_until_it_is_written_and_then_huge_pages() -> None:
    CpuDevice(torch.device("cpu")).zeros((1,), torch.uint8)  # has loaded what the next one needs
    before, own = kilobytes("AnonHugePages"), kilobytes("Anonymous")
    cache = CpuDevice(torch.device("cpu")).zeros((NUM_PAGES + 1, HUGE_PAGE), torch.uint8)
    assert kilobytes("Anonymous") - own < HUGE_PAGE // 1024
    cache[NUM_PAGES // 2] = 1
    assert cache.sum() == HUGE_PAGE
    if are_enabled(HUGE_PAGES_ENABLED):
        assert kilobytes("AnonHugePages") - before >= HUGE_PAGE // 1024  # as many as fit


SMAPS = """\
7f0000000000-7f0000100000 r-xp 00000000 08:01 1                          /usr/lib/libused.so.13
Rss:                 512 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000100000-7f0000180000 r--p 00100000 08:01 1                          /usr/lib/libused.so.13
Rss:                 512 kB
Anonymous:             4 kB
7f0000200000-7f0000300000 rw-p 00000000 08:01 1                          /usr/lib/libused.so.13
Rss:                 512 kB
Anonymous:             0 kB
7f0000300000-7f0000400000 r--p 00000000 08:01 2                          /usr/lib/a space.so
Rss:                 512 kB
Anonymous:             0 kB
7f0000400000-7f0000500000 r--p 00000000 08:01 3                          /models/model.safetensors
Anonymous:             0 kB
7f0000500000-7f0000600000 r--p 00000000 00:00 0
Anonymous:             0 kB
"""


def test_only_what_nobody_may_change_and_nobody_has_changed_of_libraries_is_given_up() -> None:
    assert [(hex(first), hex(last)) for first, last in unchanged_libraries(SMAPS)] == [
        ("0x7f0000000000", "0x7f0000100000"),
        ("0x7f0000300000", "0x7f0000400000"),
    ]
