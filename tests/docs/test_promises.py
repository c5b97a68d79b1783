"""Each promise of docs/reliability.md names a test that holds it, and those tests exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
_ROW = re.compile(r"^\| (.+) \| `(\w+/test_\w+)`: `(test_\w+)` \|$", re.MULTILINE)


def promises() -> list[tuple[str, str, str]]:
    _, _, section = PAGE.read_text().partition("\n## Promises and their tests\n")
    section = section.partition("\n## ")[0]
    rows = _ROW.findall(section)
    assert len(rows) == len(re.findall(r"^\| (?!---|promise)", section, re.MULTILINE)), "a row of another form"
    return rows


@pytest.mark.parametrize(("promise", "file", "test"), promises())
def test_a_promise_has_its_test(promise: str, file: str, test: str) -> None:
    assert re.search(rf"^(async )?def {test}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.MULTILINE), promise
