"""Figures with their spread and target, the machine's description, and the file that keeps them.

Knows numbers and words; knows no models and no clocks.
"""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS_FOLDER = Path(__file__).parent / "results"

_LEVELS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "avx512_vnni": "VNNI", "amx_tile": "AMX"}
"""Features of a processor on which products depend, by Linux's names."""

Values = Mapping[str, Sequence[float]]
"""Values by name, one per round."""
_BOUND = re.compile(r"([≥≤]) (\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Figure:
    """A median with the smallest and largest value seen. `target` is what was aimed for: "≥ 2", "≤ 0.03", or any
    other words."""

    name: str
    value: float
    low: float
    high: float
    target: str | None = None

    @classmethod
    def of(cls, name: str, values: Sequence[float], target: str | None = None) -> "Figure":
        return cls(name, statistics.median(values), min(values), max(values), target)

    @property
    def bound(self) -> float | None:
        """The number in the target, or None."""
        match = _BOUND.fullmatch(self.target or "")
        return None if match is None else float(match[2])

    @property
    def is_met(self) -> bool | None:
        """True if the value is within the target's bound; None if there is no bound."""
        bound = self.bound
        if self.target is None or bound is None:
            return None
        return self.value >= bound if self.target.startswith("≥") else self.value <= bound

    def line(self) -> str:
        """Returns one row of the printed table."""
        verdict = {True: ": met", False: ": missed", None: ""}[self.is_met]
        target = f"   target {self.target}{verdict}" if self.target else ""
        return f"{self.name:46} {self.value:10.4g}   ({self.low:.4g} … {self.high:.4g}){target}"

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "name"} | {"met": self.is_met}


class Report:
    """The figures and notes of one run, in the order in which they were added."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.notes: list[str] = []
        self.failures: list[str] = []
        """Names of the parts that could not be measured."""
        self._commit = commit()  # files may change while it measures

    def add(self, name: str, values: Sequence[float], target: str | None = None) -> None:
        """Adds a figure from one value per round. Adds none without values; a note says why then."""
        if values:
            self.figures.append(Figure.of(name, values, target))

    def add_mean(self, name: str, values: Sequence[float]) -> None:
        """Adds a figure whose value is the mean."""
        if values:
            self.figures.append(Figure(name, statistics.fmean(values), min(values), max(values)))

    def add_ratio(self, name: str, values: Values, upper: str, lower: str, target: str | None = None) -> None:
        """Adds `upper` over `lower`, taken within each round, so that a drifting clock cancels out."""
        if upper in values and lower in values:
            self.add(name, [a / b for a, b in zip(values[upper], values[lower], strict=True)], target)

    def add_ratio_to_best(
        self, name: str, values: Values, upper: str, lowers: Sequence[str], target: str | None = None
    ) -> None:
        """Adds `upper` over the best of `lowers`, the one with the largest median, and a note that names it."""
        known = [lower for lower in lowers if lower in values]
        if upper in values and known:
            best = max(known, key=lambda lower: statistics.median(values[lower]))
            self.add_ratio(name, values, upper, best, target)
            self.note(f"{name}: {upper} over {best}, the best of {', '.join(known)}")

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turns an error inside the block into a note and a failure; the rest goes on."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines()
            self.note(f"{what}: left out, {type(error).__name__}: {lines[0] if lines else 'no message'}")
            self.failures.append(what)

    def print(self) -> None:
        """Prints the machine, the figures and the notes."""
        print(f"\n{machine()}\n")
        print(*(figure.line() for figure in self.figures), sep="\n")
        print("", *(f"- {note}" for note in self.notes), sep="\n")

    def to_json(self) -> dict[str, Any]:
        figures = {figure.name: figure.to_json() for figure in self.figures}
        made = {"machine": machine(), "commit": self._commit, "command": "python -m benchmarks"}
        return made | {"failures": self.failures, "notes": self.notes, "figures": figures}

    def write(self, folder: Path) -> None:
        """Writes everything to `latest.json` in `folder`; the file that was there becomes `previous.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
        latest = folder / "latest.json"
        if latest.exists():
            latest.replace(folder / "previous.json")
        latest.write_text(text + "\n", encoding="utf-8")

    def changes(self, folder: Path) -> list[str]:
        """Returns a line for each figure whose range lies outside its range in `latest.json` in `folder`."""
        latest = folder / "latest.json"
        if not latest.exists():
            return []
        kept = json.loads(latest.read_text(encoding="utf-8"))
        befores = [(figure, kept["figures"].get(figure.name)) for figure in self.figures]
        lines = [
            f"{figure.name:46} {before['value']:10.4g}  →  {figure.value:.4g}"
            for figure, before in befores
            if before is not None and (figure.low > before["high"] or figure.high < before["low"])
        ]
        return [f"changed since the last results, of {kept['machine']}:", *lines] if lines else []


def commit() -> str:
    """Returns the commit that is checked out, with a plus if files differ from it; "unknown" outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        number = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return number.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine() -> str:
    """Returns the machine's description in one line."""
    model, has = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {name.strip(): value.strip() for name, value in facts.items()}
        flags = facts.get("flags", "").split()
        model = facts.get("model name", model)
        has = f" ({', '.join(words for flag, words in _LEVELS.items() if flag in flags)})"
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{model}{has}, {os.cpu_count()} CPUs, {system}, torch {importlib.metadata.version('torch')}"
