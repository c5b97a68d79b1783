"""Figures with their spread and target, the machine they were taken on, and the file that keeps them."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS_FILE = Path(__file__).parent / "results" / "latest.json"


@dataclass(frozen=True, slots=True)
class Figure:
    """A median with the smallest and largest value seen. `target` says what was asked for, in words."""

    name: str
    value: float
    low: float
    high: float
    target: str | None = None

    @classmethod
    def of(cls, name: str, values: Sequence[float], target: str | None = None) -> "Figure":
        return cls(name, statistics.median(values), min(values), max(values), target)

    def line(self) -> str:
        """One row for people."""
        target = f"   target {self.target}" if self.target else ""
        return f"{self.name:32} {self.value:9.3f}   ({self.low:.3f} … {self.high:.3f}){target}"


def machine() -> str:
    """The machine in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def write_results(figures: Sequence[Figure], notes: Sequence[str]) -> None:
    """Keeps the figures in `results/latest.json`."""
    rows = {figure.name: {k: v for k, v in asdict(figure).items() if k != "name"} for figure in figures}
    RESULTS_FILE.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), "notes": list(notes), "figures": rows}, indent=2, ensure_ascii=False)
    RESULTS_FILE.write_text(text + "\n")
