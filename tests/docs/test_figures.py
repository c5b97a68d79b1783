"""The figures of the docs are those of the latest whole run, each of which names its machine, commit and command."""

from pathlib import Path

import pytest

from benchmarks.page import PAGES, latest_results, with_figures
from benchmarks.tables import TABLES


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_tables_of_a_page_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- figures: " in text
    assert with_figures(text, latest_results()) == text, "run `python -m benchmarks.page`"


def test_results_name_their_machine_commit_and_command() -> None:
    results = latest_results()
    assert results["machine"]
    assert results["commit"] != "unknown"
    assert results["command"] == "python -m benchmarks"


def test_an_aim_stands_beside_the_figure_with_whether_it_was_met() -> None:
    figure = {"value": 2.5, "low": 2.0, "high": 1234.5, "target": "≥ 3", "met": False}
    lines = TABLES["ratios"].lines({"int4_vs_llama_cpp": figure})
    assert lines[2:] == ["| INT4 ÷ llama.cpp's fastest 4-bit format | 2.5 (2 … 1,234) | ≥ 3, missed |"]


def test_the_readme_and_the_page_of_figures_are_short() -> None:
    limits = {"README.md": 80, "performance.md": 200, "exact.md": 120}
    for page in PAGES:
        assert len(page.read_text(encoding="utf-8").splitlines()) <= limits[page.name], page
