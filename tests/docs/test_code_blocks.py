"""Runs every code block of the documentation as it stands, against a real server with the embedded model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.code_blocks import LANGUAGES, code_blocks, run_blocks
from tests.e2e.service import Service

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
READ_FIRST = ROOT / "README.md", ROOT / "docs" / "quickstart.md"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, embedded_cache: Path) -> Iterator[Service]:
    variables = {
        # The user's cache, as a reader's server has it.
        "DASH_CACHE_FOLDER": str(embedded_cache),
        # Enough to show that an example works.
        "DASH_DEFAULT_MAX_NEW_TOKENS": "12",
    }
    service = Service(tmp_path_factory.mktemp("docs"), Path("embedded"), **variables)
    yield service
    service.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert {block.place: block.language for block in code_blocks(page) if block.language not in LANGUAGES} == {}


@pytest.mark.embedded
@pytest.mark.parametrize(
    "page",
    [*READ_FIRST, *(pytest.param(page, marks=pytest.mark.long) for page in PAGES if page not in READ_FIRST)],
    ids=lambda page: page.name,
)
def test_the_blocks_of_a_page_run(page: Path, service: Service, tmp_path: Path) -> None:
    run_blocks(code_blocks(page), tmp_path, service.client.target)


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for language, code in (("python", "1 / 0"), ("python", "await missing()"), ("sh", "false | true"), ("toml", "= 1")):
        page.write_text(f"```{language}\n{code}\n```\n")
        with pytest.raises((AssertionError, ValueError)):
            run_blocks(code_blocks(page), tmp_path, "localhost:1")


def test_comments_say_what_is_not_run_and_what_comes_first(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- first: x = 1 -->\n```python\nassert x\n```\n\n<!-- not run: no way -->\n```sh\nfalse\n```\n")
    first, second = code_blocks(page)
    assert first.code == "x = 1\nassert x\n"
    assert (first.is_run, second.is_run, second.why_not_run) == (True, False, "no way")
    run_blocks([first, second], tmp_path, "localhost:1")


def test_python_goes_on_where_it_was_and_may_await(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    waiting = "import asyncio\nasync def two():\n    await asyncio.sleep(0)\n    return 2\nx = await two()"
    page.write_text(f"```python\n{waiting}\n```\n\n```python\nassert x == 2\n```\n")
    run_blocks(code_blocks(page), tmp_path, "localhost:1")
