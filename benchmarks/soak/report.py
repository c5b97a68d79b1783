"""The findings of a part of the soak: figures with their bounds, printed as a table."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was checked, what must hold, what was seen, and if it held."""

    what: str
    must: str
    seen: str
    held: bool


def finding(what: str, must: str, seen: object, held: bool) -> Finding:
    return Finding(what, must, str(seen), held)


def print_findings(title: str, findings: Sequence[Finding]) -> bool:
    """Prints the findings; returns True if all held."""
    print(f"\n{title}")
    for line in findings:
        mark = "ok    " if line.held else "FAILED"
        print(f"  {mark}  {line.what}: {line.seen} (must be: {line.must})", flush=True)
    return all(line.held for line in findings)
