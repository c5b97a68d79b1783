"""The findings of a part of the soak: figures with their bounds, printed as a table."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was checked, what must hold, what was seen, and if it held."""

    what: str
    must: str
    seen: str
    held: bool


Part = tuple[str, Callable[[], Coroutine[Any, Any, list[Finding]]]]
"""A part's title, and what runs it."""


def finding(what: str, must: str, seen: object, held: bool) -> Finding:
    return Finding(what, must, str(seen), held)


def first_traceback(log: str) -> str:
    """Returns the log around the first traceback, so that a rare one can be understood; nothing without one."""
    place = log.find("Traceback")
    return "" if place < 0 else f": {log[max(0, place - 500) : place + 2500]}"


def run_parts(parts: Mapping[str, Part]) -> int:
    """Runs parts one after another, and prints what they find; returns the exit code."""
    failed = []
    for name, (title, run) in parts.items():
        started = time.monotonic()
        try:
            findings = asyncio.run(run())
        except Exception as error:  # the other parts are still worth running
            findings = [finding("the part itself", "runs to its end", f"{type(error).__name__}: {error}", False)]
        if not print_findings(title, findings):
            failed.append(name)
        print(f"  ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\neverything held")
    return int(bool(failed))


def print_findings(title: str, findings: Sequence[Finding]) -> bool:
    """Prints the findings; returns True if all held."""
    print(f"\n{title}")
    for line in findings:
        mark = "ok    " if line.held else "FAILED"
        print(f"  {mark}  {line.what}: {line.seen} (must be: {line.must})", flush=True)
    return all(line.held for line in findings)
