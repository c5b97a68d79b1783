"""Keeps what a start measured for later starts, one file a table, and whether the machine was quiet meanwhile.

Knows files; knows nothing of what is measured.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dash_runtime.errors import ConfigError
from dash_runtime.files.disk_cache import keep
from dash_runtime.progress import Progress
from dash_runtime.startup.quiet import Quiet, quietness

Facts = dict[str, Any]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class KeptTable(Generic[_Value]):
    """One table and its file."""

    path: Path
    parse: Callable[[Facts], _Value]
    """Raises what `KeptTables.read` catches for facts that are damaged, or of something else than what is here."""
    to_json: Callable[[_Value], Facts]
    what: str
    """As in "measuring what each action costs here"."""


class KeptTables:
    """Reads, measures and writes tables.

    What was measured beside other work is measured again by the next start, once: where the machine is busy then, too,
    that is how it is.

    Args:
        checks_kept: False to trust whatever was kept.
    """

    def __init__(self, checks_kept: bool, quietness: Callable[[], AbstractContextManager[Quiet]] = quietness) -> None:
        self._checks_kept = checks_kept
        self._quietness = quietness

    def read(self, table: KeptTable[_Value]) -> _Value | None:
        """Returns the kept table; None if it is to be made: its file is missing or damaged, or others had the cores."""
        try:
            kept = json.loads(table.path.read_text())
            is_trusted = not self._checks_kept or kept["was_quiet"] or kept["was_measured_again"]
            return table.parse(kept["table"]) if is_trusted else None
        except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError, ConfigError):
            return None

    def write(self, table: KeptTable[_Value], value: _Value, was_quiet: bool = True) -> None:
        """Keeps the table."""
        facts = {"was_quiet": was_quiet, "was_measured_again": table.path.exists(), "table": table.to_json(value)}
        keep(table.path, lambda unfinished: unfinished.write_text(json.dumps(facts, indent=1)))

    def measure(
        self,
        table: KeptTable[_Value],
        measure: Callable[[], _Value],
        progress: Progress,
        doubted: Callable[[_Value], _Value] = lambda value: value,
    ) -> _Value:
        """Measures a table, keeps it and returns it; beside other work, as `doubted` has it."""
        progress(f"measuring {table.what} here (kept for later starts)")
        with self._quietness() as quiet:
            value = measure()
        if not quiet.is_quiet:
            progress(f"other work had the cores meanwhile: {table.what} may be wrong")
            value = doubted(value)
        self.write(table, value, quiet.is_quiet)
        return value
