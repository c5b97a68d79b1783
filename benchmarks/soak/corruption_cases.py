"""Damages one file, loads it, and judges the outcome.

REFUSED is one of the runtime's own errors, in one short line that names the file. MADE AGAIN is a cached conversion
that was found to be damaged. ACCEPTED is anything that loads. BROKEN is everything else.
"""

import contextlib
import hashlib
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.soak.corruptible_files import KINDS, FileKind
from benchmarks.soak.loaders import Loaded
from dash_runtime.errors import DashRuntimeError

HANG_SECONDS = 5.0
MAX_EXTRA_BYTES = 500 * 10**6
MAX_MESSAGE_CHARS = 500
"""Without the path, whose length is not ours to choose."""


class Outcome(StrEnum):
    """The outcome for a damaged file."""

    REFUSED = "refused"
    MADE_AGAIN = "made again"
    ACCEPTED = "accepted"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Case:
    """One damage, determined by `kind`, `number` and `seed`."""

    kind: str
    number: int
    seed: int

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.number}"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a case. `differences` are the parts that an accepted file changed."""

    case: Case
    damage: str
    outcome: Outcome
    detail: str
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Result":
        return cls(
            Case(**values["case"]),
            values["damage"],
            Outcome(values["outcome"]),
            values["detail"],
            tuple(values["differences"]),
        )


def cases(number: int, seed: int, kinds: Sequence[FileKind] = KINDS) -> list[Case]:
    """Returns `number` cases, dealt to the kinds by their shares."""
    turns = [kind.name for kind in kinds for _ in range(kind.share)]
    dealt = [turns[place % len(turns)] for place in range(number)]
    return [Case(kind, dealt[:place].count(kind), seed) for place, kind in enumerate(dealt)]


class CorruptionRun:
    """Runs cases in `scratch`, from the originals of `make_originals`."""

    def __init__(self, originals: Path, scratch: Path) -> None:
        self._originals = originals
        self._scratch = scratch
        self._kinds = {kind.name: kind for kind in KINDS}
        self._expected: dict[str, Loaded] = {}

    def run(self, case: Case) -> Result:
        """Damages, loads and judges one case."""
        kind = self._kinds[case.kind]
        expected = self._loaded_undamaged(kind)
        folder = self._copy(kind)
        rng = random.Random(f"{case.seed}/{case.label}")
        file = folder / rng.choice(kind.files)
        before = _digest(file)
        damage = f"{file.name}: {rng.choice(kind.corruptions(file.name))(file, rng)}"
        unchanged = file.is_file() and file.stat().st_size < 2**24 and _digest(file) == before
        try:
            outcome, detail, differences = _judge(kind, folder, file, expected)
        finally:
            shutil.rmtree(folder)
        if unchanged and outcome is not Outcome.BROKEN:
            return Result(case, f"{damage} (no change)", Outcome.ACCEPTED, "the file is as it was")
        return Result(case, damage, outcome, detail, differences)

    def _loaded_undamaged(self, kind: FileKind) -> Loaded:
        if kind.name not in self._expected:
            folder = self._copy(kind)
            self._expected[kind.name] = kind.load(folder)
            shutil.rmtree(folder)
        return self._expected[kind.name]

    def _copy(self, kind: FileKind) -> Path:
        folder = self._scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._originals / kind.original, folder)
        return folder


def _judge(kind: FileKind, folder: Path, file: Path, expected: Loaded) -> tuple[Outcome, str, tuple[str, ...]]:
    started = time.monotonic()
    usual_bytes = _reset_peak_bytes()
    complaint: str | None = None
    try:
        loaded = kind.load(folder)
    except DashRuntimeError as error:
        outcome, detail, differences = Outcome.REFUSED, f"{type(error).__name__}: {error}", ()
        complaint = _complaint(str(error), file, folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust libraries are not Exceptions
        return Outcome.BROKEN, f"{type(error).__module__}.{type(error).__name__}: {str(error)[:500]}", ()
    else:
        outcome, detail, differences = _compared(kind, loaded, expected)
        if loaded.message is not None:
            complaint = _complaint(loaded.message, file, folder)
    seconds = time.monotonic() - started
    extra_bytes = _peak_bytes() - usual_bytes
    if seconds > HANG_SECONDS:
        complaint = f"it took {seconds:.1f} s"
    if extra_bytes > MAX_EXTRA_BYTES:
        complaint = f"it took {extra_bytes / 1e6:.0f} MB"
    if complaint is not None:
        return Outcome.BROKEN, f"{complaint}: {detail[:700]}", ()
    return outcome, detail.replace(str(folder), "…"), differences


def _compared(kind: FileKind, loaded: Loaded, expected: Loaded) -> tuple[Outcome, str, tuple[str, ...]]:
    names = sorted(loaded.parts.keys() | expected.parts.keys())
    differences = tuple(name for name in names if loaded.parts.get(name) != expected.parts.get(name))
    knowable = [name for name in differences if reason_to_accept(kind, name) is None]
    if knowable:
        was = [f"{name} {expected.parts.get(name, '')[:80]} -> {loaded.parts.get(name, '')[:80]}" for name in knowable]
        return Outcome.BROKEN, f"accepted: {'; '.join(was)}", differences
    if loaded.message is not None:
        return Outcome.MADE_AGAIN, loaded.message, ()
    return Outcome.ACCEPTED, ", ".join(differences) or "nothing differs", differences


def reason_to_accept(kind: FileKind, part: str) -> str | None:
    """Returns why the file cannot show that this loaded part is wrong, or None."""
    for name, reason in kind.unknowable.items():
        if part == name or (name.endswith("*") and part.startswith(name[:-1])):
            return reason
    return None


def _complaint(message: str, file: Path, folder: Path) -> str | None:
    """Returns what is wrong with an error's message, or None."""
    if not message.isprintable():
        return f"its message is not one printable line ({message[:300]!r})"
    length = len(message.replace(str(file), "").replace(str(folder), ""))
    if length > MAX_MESSAGE_CHARS:
        return f"its message has {length} characters"
    if str(file) not in message and not (file.name in message and str(file.parent) in message):
        return "its message does not name the file"
    return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _reset_peak_bytes() -> int:
    """Resets the peak of this process's memory, where that is allowed, and returns it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
