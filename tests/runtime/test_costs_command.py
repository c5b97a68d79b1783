"""`dash-policy costs` shows the table that a server here would use, and measures it again."""

from dataclasses import replace
from pathlib import Path

import pytest

from dash_runtime.commands.cli import main
from dash_runtime.commands.costs import table_of
from tests.runtime.cost_samples import TRUE, measured


def test_the_table_shows_cost_spread_and_age() -> None:
    lines = table_of(measured(TRUE), 1.0 + 2 * 86400 + 5).splitlines()
    rows = {line[:28].strip(): [float(part) for part in line[28:].split()] for line in lines[1:-1]}
    assert list(rows) == [
        "layer SKIP", "layer INT4", "layer INT8", "layer FULL", "head INT8", "head FULL", "rest of a token",
        "policy evaluation",
    ]  # fmt: skip
    assert rows["layer FULL"] == [0.08, 0.0144]
    assert lines[-1] == "from 8 rounds, 1970-01-01 00:00 UTC, 2 days ago"
    served = replace(measured(TRUE), num_rounds=0)
    assert table_of(served, 1.0).splitlines()[-1] == "from served steps, 1970-01-01 00:00 UTC, less than a minute ago"


@pytest.mark.usefixtures("short_measurements")
def test_costs_are_kept_until_they_are_measured_again(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["costs", "--model", str(tiny_folder), "--device", "cpu", "--cache-folder", str(tmp_path)]
    shown: list[str] = []
    for more in ([], [], ["--measure"]):
        assert main([*arguments, *more]) == 0
        shown.append(capsys.readouterr().out)
    first, second, again = (text.splitlines()[:-1] for text in shown)
    assert first == second != again
    assert "tiny" in first[0] or "CPU" in first[0]
