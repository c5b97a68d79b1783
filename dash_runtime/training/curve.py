"""The training curve: one row per iteration, in a file of JSON lines that survives stops and resumes.

Knows the rows and their files; knows no training, no torch and no plots.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

from dash_runtime.errors import ConfigError
from dash_runtime.files.atomic_file import replacing

Opener = Callable[[Path, str], IO[bytes]]
"""Opens a file, unbuffered, in a binary mode. Unbuffered, so that a full disk fails the write of the row itself."""


def open_unbuffered(path: Path, mode: str) -> IO[bytes]:
    return open(path, mode, buffering=0)


@dataclass(frozen=True, slots=True)
class CurveRow:
    """The figures of one round, an iteration of the curve: means over held-out tokens at a low, a middle and a high
    price.

    A cost is a share of the full-depth token, a loss is in nats per token (for a drafter a probability), `num_labels`
    counts the labels so far, `seconds` is the training time up to the end of this round, without stops. A figure that
    is not finite is written as null and read as NaN.
    """

    iteration: int
    num_labels: float
    cost_low: float
    loss_low: float
    cost_middle: float
    loss_middle: float
    cost_high: float
    loss_high: float
    seconds: float

    def to_json(self) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


class TrainingCurve:
    """The curve of a running training, in `path` and in memory."""

    def __init__(self, path: Path, start_iteration: int, opener: Opener = open_unbuffered) -> None:
        """Keeps the rows before `start_iteration`; a resumed run repeats those at and after it.

        Raises:
            ConfigError: the file is damaged before its last line, or cannot be read or written.
        """
        self._path = path
        self._opener = opener
        # A run from the start keeps no rows, so that a damaged file of an earlier run does not stop it.
        old = read_curve(path) if start_iteration > 0 and os.path.exists(path) else []
        self._rows = [row for row in old if row.iteration < start_iteration]
        write_whole(path, b"".join(map(_line, self._rows)), opener)

    def append(self, row: CurveRow) -> None:
        """Adds a row, and writes its line to the file.

        Raises:
            ConfigError: the disk is full, or the file cannot be written; no half line stays behind.
            ValueError: a row of this iteration or of a later one exists.
        """
        if self._rows and row.iteration <= self._rows[-1].iteration:
            raise ValueError(f"iteration {row.iteration} comes after {self._rows[-1].iteration}")
        try:
            with self._opener(self._path, "ab") as file:
                length = file.seek(0, os.SEEK_END)
                try:
                    _write_all(file, _line(row))
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(length)
                    raise
        except OSError as error:
            raise _cannot_write(self._path, error) from None
        self._rows.append(row)

    def rows(self) -> list[CurveRow]:
        """Returns the rows so far by iteration, those from before a stop included."""
        return list(self._rows)

    @property
    def seconds(self) -> float:
        """Training time up to the last row; a resumed run adds to it."""
        return self._rows[-1].seconds if self._rows else 0.0


def read_curve(path: Path) -> list[CurveRow]:
    """Returns the rows of a curve file by iteration, without a last line that was cut off.

    Raises:
        ConfigError: the file cannot be read, a line of it is no row, or its iterations do not ascend.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError("curve", f"{path} cannot be read ({error.strerror})") from None
    rows: list[CurveRow] = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        try:
            row = _row(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ConfigError("curve", f"line {number} of {path} is damaged ({error}); mend or remove it") from None
        if rows and row.iteration <= rows[-1].iteration:
            raise ConfigError(
                "curve",
                f"line {number} of {path} has iteration {row.iteration} after {rows[-1].iteration}; mend or remove it",
            )
        rows.append(row)
    return rows


def write_curve_json(rows: Iterable[CurveRow], path: Path, opener: Opener = open_unbuffered) -> None:
    """Writes the curve as one JSON list of objects, in one rename.

    Raises:
        ConfigError: the file cannot be written; what was there before stays.
    """
    write_whole(path, (json.dumps([row.to_json() for row in rows], indent=1) + "\n").encode(), opener)


def write_whole(path: Path, content: bytes, opener: Opener = open_unbuffered) -> None:
    """Writes a file whole or not at all.

    Raises:
        ConfigError: the file cannot be written; what was there before stays.
    """
    try:
        with replacing(path) as partial, opener(partial, "wb") as file:
            _write_all(file, content)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _write_all(file: IO[bytes], content: bytes) -> None:
    # An unbuffered write may write only a part on a disk that is nearly full.
    while content:
        content = content[file.write(content) :]


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError("out", f"no space is left for {path}; make room and give the same command again")
    return ConfigError("out", f"{path} cannot be written ({error.strerror})")


def _line(row: CurveRow) -> bytes:
    return json.dumps(row.to_json()).encode() + b"\n"


def _row(line: bytes) -> CurveRow:
    """Parses a line; raises ValueError with the fault."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    names = [field.name for field in fields(CurveRow)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise ValueError(f"not an object of {', '.join(names)}")
    iteration = values.pop("iteration")
    if type(iteration) is not int or iteration < 0:
        raise ValueError(f"iteration is {iteration!r}")
    return CurveRow(iteration, **{name: _figure(name, value) for name, value in values.items()})


def _figure(name: str, value: object) -> float:
    if value is None:
        return math.nan
    # A bool is an int in Python, but no figure.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large") from None
