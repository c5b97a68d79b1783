"""`python -m benchmarks.page`: writes the figures of the latest whole run into the docs' tables.

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`; `<!-- figures: run -->` names machine, commit and
command. So docs and results cannot differ; a test holds them together.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS_FOLDER
from benchmarks.tables import TABLES

_ROOT = Path(__file__).parent.parent
PAGES = tuple(_ROOT / page for page in ("README.md", "docs/performance.md", "docs/exact.md"))
_BLOCK = re.compile(r"(?P<begin><!-- figures: (?P<name>[a-z ]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def with_figures(text: str, results: dict[str, Any]) -> str:
    """Returns a page with its tables filled in.

    Raises:
        KeyError: there is no such table.
    """

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        lines = [_run(results)] if name == "run" else TABLES[name].lines(results["figures"])
        return match["begin"] + "".join(f"{line}\n" for line in lines) + match["end"]

    return _BLOCK.sub(filled, text)


def latest_results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS_FOLDER / "latest.json").read_text(encoding="utf-8"))
    return results


def _run(results: dict[str, Any]) -> str:
    return f"{results['machine']}; commit {results['commit']}, `{results['command']}`."


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_figures(text, latest_results()), encoding="utf-8")


if __name__ == "__main__":
    main()
