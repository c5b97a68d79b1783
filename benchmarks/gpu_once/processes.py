"""Runs each unit of the run in a process of its own: after one device error nothing in that process can be trusted.

Knows commands, files and time; knows not what units do. Imports no torch.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_once.live_report import FILE_NAME

OUTPUT_NAME = "output.txt"


def run_units(
    folder: Path,
    units: Sequence[str],
    seconds: float,
    arguments: Sequence[str],
    now: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Runs the units one after another, each with a folder inside `folder`, and joins their reports in `gpu_once.json`.

    Args:
        seconds: the time for all of them; those that are left then are left out.
        arguments: for each unit's process.

    Returns:
        What is broken: what the units say, and the units that did not come to their end.
    """
    ends_at, joined = now() + seconds, dict[str, Any]()
    folder.mkdir(parents=True, exist_ok=True)
    for unit in units:
        left = ends_at - now()
        if left <= 0:
            own = _ended(unit, {"left_out": "the run's time is over"})
            print(f"\n{unit}\n- left out: the run's time is over", flush=True)
        else:
            own = _run(folder / unit, unit, [*arguments, "--seconds", f"{left:.0f}"])
        _join(joined, own)
        (folder / FILE_NAME).write_text(json.dumps(joined, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    broken: list[str] = joined["broken_parities"]
    return broken


def _run(folder: Path, unit: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a unit, shows and keeps its output, and returns its report."""
    folder.mkdir(exist_ok=True)
    path = folder / FILE_NAME
    path.unlink(missing_ok=True)
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.gpu_once", str(folder), "--only", unit]
    with (
        (folder / OUTPUT_NAME).open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
            kept.flush()
    own: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if process.returncode == (1 if own.get("broken_parities") else 0) and own:
        return own
    print(f"- {unit} ended with {process.returncode}", flush=True)
    _join(own, _ended(unit, {"error": f"its process ended with {process.returncode}; see {unit}/{OUTPUT_NAME}"}))
    return own


def _ended(unit: str, why: dict[str, str]) -> dict[str, Any]:
    return {"parts": {unit: why}, "broken_parities": [unit]}


def _join(joined: dict[str, Any], own: dict[str, Any]) -> None:
    """Adds a report to others: what is in lists and by names is put together, else the first one's holds."""
    for key, value in own.items():
        if isinstance(value, dict):
            joined.setdefault(key, {}).update(value)
        elif isinstance(value, list):
            before = joined.setdefault(key, [])
            before += [entry for entry in value if entry not in before]
        else:
            joined.setdefault(key, value)
