"""A file that was found good is not read again until anything was done to it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dash_runtime.files.checked_once import fault_of

SIZE = 1 << 20


def later() -> float:
    return time.time() + 10


class Looks:
    """Counts how often a file is looked at, and finds what it is told to."""

    def __init__(self, fault: str | None = None) -> None:
        self.fault = fault
        self.count = 0

    def __call__(self) -> str | None:
        self.count += 1
        return self.fault


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    return path


def test_a_good_file_is_looked_at_once(file: Path) -> None:
    looks = Looks()
    assert [fault_of(file, looks, clock=later) for _ in range(3)] == [None] * 3
    assert looks.count == 1


def _write_the_same_size(path: Path) -> None:
    times = path.stat()
    with path.open("r+b") as opened:
        opened.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.replace(path)


@pytest.mark.parametrize("change", [_write_the_same_size, _replace, lambda path: os.truncate(path, SIZE + 1)])
def test_it_is_looked_at_again_once_anything_was_done_to_it(file: Path, change: Callable[[Path], object]) -> None:
    fault_of(file, Looks(), clock=later)
    time.sleep(0.02)  # some clocks of file systems tick every 10 ms
    change(file)
    assert fault_of(file, Looks("a bit"), clock=later) == "a bit"


def test_it_is_looked_at_again_when_it_is_held_against_something_else(file: Path) -> None:
    fault_of(file, Looks(), "one digest", clock=later)
    assert fault_of(file, Looks("a bit"), "another", clock=later) == "a bit"


def test_a_fault_is_found_every_time(file: Path) -> None:
    looks = Looks("a bit")
    assert [fault_of(file, looks, clock=later) for _ in range(2)] == ["a bit"] * 2
    assert looks.count == 2


def test_a_young_file_is_looked_at_again_since_a_change_may_not_show(file: Path) -> None:
    looks = Looks()
    for _ in range(2):
        fault_of(file, looks)
    assert looks.count == 2


@pytest.mark.parametrize("note", ["", "nonsense", b"\xff\xfe"])
def test_a_damaged_note_costs_a_look(file: Path, note: str | bytes) -> None:
    fault_of(file, Looks(), clock=later)
    (own,) = file.parent.glob(".*.checked")
    own.write_bytes(note if isinstance(note, bytes) else note.encode())
    assert fault_of(file, Looks("a bit"), clock=later) == "a bit"


def test_a_missing_file_is_no_good_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fault_of(tmp_path / "nothing", Looks())
