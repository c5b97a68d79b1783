"""A report that is printed and written as it grows, so that a later failure loses nothing.

Knows figures, parts and time; knows no models.
"""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Report

FILE_NAME = "gpu_once.json"


class OutOfTime(Exception):
    """The run's time is over."""


class LiveReport(Report):
    """Figures, notes and parts, in `gpu_once.json` in a folder.

    Args:
        folder: is made if it is not there.
        seconds: time that the run may take; what is left then is left out.
        now: a clock.
    """

    def __init__(self, folder: Path, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.parts: dict[str, dict[str, Any]] = {}
        """By name: seconds, and the error if it failed or what it was left out for."""
        self._required: list[str] = []
        self._failed: list[str] = []
        self._now = now
        self._ends_at = now() + seconds

    @property
    def broken_parities(self) -> list[str]:
        """The required figures that missed their bound, and the parts that should have measured some and did not."""
        missed = [figure.name for figure in self.figures if figure.name in self._required and not figure.is_met]
        return [*missed, *self._failed]

    def has_time(self) -> bool:
        return self._now() < self._ends_at

    def seconds_left(self) -> float:
        return max(0.0, self._ends_at - self._now())

    def check_time(self) -> None:
        """Raises `OutOfTime` if the run's time is over."""
        if not self.has_time():
            raise OutOfTime("the run's time is over")

    def part(self, name: str, work: Callable[[], None], is_parity: bool = False) -> None:
        """Runs a part of the run, if there is time. Its failure is recorded; the caller goes on.

        A part that `is_parity` counts as a broken parity if it does not come to its end.
        """
        print(f"\n{name}", flush=True)
        started = self._now()
        own = self.parts[name] = {}
        try:
            self.check_time()
            work()
        except OutOfTime as error:
            own["left_out"] = str(error)
            print(f"- left out: {error}", flush=True)
        except Exception as error:
            own["error"] = traceback.format_exc()
            print(f"- failed: {type(error).__name__}\n{own['error']}", flush=True)
        if own and is_parity:
            self._failed.append(name)
        own["seconds"] = round(self._now() - started, 1)
        self._save()

    def add(self, name: str, values: Sequence[float], target: str | None = None) -> None:
        before = len(self.figures)
        super().add(name, values, target)
        for figure in self.figures[before:]:
            print(figure.line(), flush=True)
        self._save()

    def require(self, name: str, value: float, target: str) -> None:
        """Adds a parity: a figure that breaks the run if it misses its bound."""
        self._required.append(name)
        self.add(name, [value], target)

    def note(self, text: str) -> None:
        super().note(text)
        print(f"- {text}", flush=True)
        self._save()

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"broken_parities": self.broken_parities, "parts": self.parts}

    def _save(self) -> None:
        path = self.folder / FILE_NAME
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
