"""The training curve survives stops, cut-off lines and full disks."""

import errno
import json
import math
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import IO

import pytest

from dash_runtime.errors import ConfigError
from dash_runtime.training.curve import CurveRow, TrainingCurve, read_curve, write_curve_json


def row(iteration: int) -> CurveRow:
    return CurveRow(iteration, 1000.0, 0.95, 0.02, 0.9125, 0.104, 0.81, 0.6, 2.5 * (iteration + 1))


def rows(count: int) -> list[CurveRow]:
    return [row(iteration) for iteration in range(count)]


def grow(path: Path, count: int, start: int = 0) -> TrainingCurve:
    curve = TrainingCurve(path, start)
    for iteration in range(start, count):
        curve.append(row(iteration))
    return curve


class SmallDisk:
    """An opener whose files take `room` more bytes and then fail as on a full disk."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path, mode: str) -> IO[bytes]:
        return FileOnSmallDisk(path, mode, self)


class FileOnSmallDisk(FileIO):
    def __init__(self, path: Path, mode: str, disk: SmallDisk) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, content: bytes) -> int:  # type: ignore[override]
        if self._disk.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = content[: self._disk.room]
        self._disk.room -= len(taken)
        return super().write(taken)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "training.jsonl"


def test_rows_are_read_back_as_they_were_appended(path: Path) -> None:
    curve = grow(path, 3)
    assert read_curve(path) == curve.rows() == rows(3)


def test_each_row_is_in_the_file_when_append_returns(path: Path) -> None:
    curve = TrainingCurve(path, 0)
    for count in range(1, 4):
        curve.append(row(count))
        assert path.read_text().count("\n") == count


def test_a_new_run_has_an_empty_file_from_the_start(path: Path) -> None:
    assert TrainingCurve(path, 0).rows() == []
    assert read_curve(path) == []


def test_a_resumed_run_drops_the_rows_that_it_repeats(path: Path) -> None:
    grow(path, 13)
    assert TrainingCurve(path, 10).rows() == rows(10)
    grow(path, 15, start=10)
    assert read_curve(path) == rows(15)


def test_a_run_from_the_start_drops_all_rows_even_of_a_damaged_file(path: Path) -> None:
    path.write_text("no row\nno row either\n")
    assert TrainingCurve(path, 0).rows() == []
    assert path.read_bytes() == b""


def test_the_training_time_goes_on_where_it_stopped(path: Path) -> None:
    grow(path, 13)
    assert TrainingCurve(path, 10).seconds == 25.0
    assert TrainingCurve(path, 0).seconds == 0.0


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_last_line_that_was_cut_off_is_left_out_and_mended(path: Path, cut: int) -> None:
    grow(path, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # A row without its line end is still whole.
    kept = 4 if cut == 1 else 3
    assert read_curve(path) == rows(kept)
    grow(path, 6, start=kept)
    assert read_curve(path) == rows(6)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{half", "not JSON"),
        ("\x00\x00", "not JSON"),
        ("", "not JSON"),
        ("[1, 2]", "not an object"),
        (json.dumps({"iteration": 1}), "not an object"),
        (json.dumps(row(1).to_json() | {"cost_low": "cheap"}), "cost_low is 'cheap'"),
        (json.dumps(row(1).to_json() | {"cost_low": True}), "cost_low is True"),
        (json.dumps(row(1).to_json() | {"cost_low": 10**400}), "cost_low is too large"),
        (json.dumps(row(1).to_json() | {"iteration": 1.5}), "iteration is 1.5"),
        (json.dumps(row(1).to_json() | {"iteration": -1}), "iteration is -1"),
        (json.dumps(row(0).to_json()), "iteration 0 after 0"),
    ],
)
def test_a_damaged_line_is_named(path: Path, line: str, complaint: str) -> None:
    lines = [json.dumps(row(0).to_json()), line, json.dumps(row(2).to_json())]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=f"line 2 of .*{complaint}"):
        read_curve(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="line 2"):
        TrainingCurve(path, 2)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_curve(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be written"):
        TrainingCurve(tmp_path / "none" / "training.jsonl", 0)


def test_an_iteration_is_never_there_twice(path: Path) -> None:
    curve = grow(path, 3)
    with pytest.raises(ValueError, match="iteration 2 comes after 2"):
        curve.append(row(2))
    assert read_curve(path) == rows(3)


def test_a_figure_that_is_not_finite_is_null_and_then_nan(path: Path) -> None:
    TrainingCurve(path, 0).append(replace(row(0), loss_low=math.nan, loss_high=math.inf))
    assert json.loads(path.read_text())["loss_low"] is None
    back = read_curve(path)[0]
    assert math.isnan(back.loss_low)
    assert math.isnan(back.loss_high)
    assert back.cost_low == row(0).cost_low


def test_a_full_disk_is_said_plainly_and_leaves_no_half_line(path: Path) -> None:
    disk = SmallDisk(room=10_000)
    curve = TrainingCurve(path, 0, disk)
    curve.append(row(0))
    before = path.read_bytes()
    disk.room = 30
    with pytest.raises(ConfigError, match=r"no space is left for .*training\.jsonl"):
        curve.append(row(1))
    assert path.read_bytes() == before
    disk.room = 10_000
    curve.append(row(1))
    assert read_curve(path) == curve.rows() == rows(2)


def test_a_disk_that_is_full_at_the_resume_costs_no_row(path: Path) -> None:
    grow(path, 13)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"no space is left for .*training\.jsonl"):
        TrainingCurve(path, 10, SmallDisk(room=30))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_json_curve_holds_all_rows_and_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    write_curve_json(rows(3), path)
    before = path.read_bytes()
    assert [CurveRow(**values) for values in json.loads(before)] == rows(3)
    with pytest.raises(ConfigError, match="no space is left"):
        write_curve_json(rows(5), path, SmallDisk(room=200))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
