"""Programs that a model has written run against their tests, apart from all else, and the records that ask for them."""

import json
import socket
from pathlib import Path

import pytest

from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.programs import code_in, require_isolation, which_pass
from dash_runtime.evaluation.task_files import ProgramQuestion, read_tasks

RIGHT = "def twice(n):\n    return 2 * n\n"
TESTS = "assert twice(2) == 4\nassert twice(-1) == -2"


@pytest.fixture
def isolation() -> None:
    try:
        require_isolation()
    except ConfigError as error:
        pytest.skip(str(error))


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        (RIGHT + TESTS, True),
        (RIGHT + "print('x' * 100_000)\n" + TESTS, True),
        (RIGHT.replace("2 *", "3 *") + TESTS, False),
        ("this is no program", False),
        ("import sys; sys.exit(0)\n" + TESTS, False),
        ("import os; os._exit(0)\n" + TESTS, False),
        ("x = ' ' * (1 << 31)", False),
        ("open('large', 'wb').write(bytes(1 << 24))", False),
        ("import torch", False),
        ("import os, pathlib; assert pathlib.Path.home() == pathlib.Path.cwd(); assert 'PATH' not in os.environ", True),
    ],
    ids=["right", "loud", "wrong", "no program", "exits", "exits at once", "memory", "disk", "library", "surroundings"],
)
@pytest.mark.usefixtures("isolation")
def test_a_program_passes_if_it_runs_to_its_end_within_the_limits(source: str, passes: bool) -> None:
    assert which_pass([source]) == [passes]


@pytest.mark.usefixtures("isolation")
def test_a_program_that_never_ends_is_stopped_and_the_others_are_judged() -> None:
    assert which_pass(["while True: pass", RIGHT + TESTS], seconds=1.0) == [False, True]


@pytest.mark.usefixtures("isolation")
def test_a_program_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert which_pass([f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"]) == [False]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here it is:\n```python\na = 1\n```\nIt is one.\n```python\nb = 2\n```", "a = 1\n"),
        ("```\na = 1\n", "a = 1\n"),
        ("a = 1\n", "a = 1\n"),
    ],
)
def test_an_answers_code_is_its_first_block_or_all_of_it(text: str, code: str) -> None:
    assert code_in(text) == code


@pytest.mark.usefixtures("isolation")
def test_programs_are_asked_for_in_each_form(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no questions")
    written(tmp_path / "a.jsonl", {"question": "Double n by twice(n).", "tests": TESTS.splitlines()})
    beginning = 'def twice(n):\n    """Doubles n."""\n'
    checks = "def check(own):\n    assert own(2) == 4\n"
    written(tmp_path / "b.jsonl", {"prompt": beginning, "test": checks, "entry_point": "twice"},
            {"text": "Double n.", "test_list": TESTS.splitlines(), "test_imports": ["import math"]})  # fmt: skip
    questions = read_tasks(tmp_path)
    assert all(isinstance(question, ProgramQuestion) for question in questions)
    programs = [question.program(RIGHT) for question in questions if isinstance(question, ProgramQuestion)]
    wrong = [question.program("pass\n") for question in questions[:1] if isinstance(question, ProgramQuestion)]
    goes_on = questions[1].program("    return 2 * n\n")  # type: ignore[union-attr]
    assert which_pass([*programs, *wrong, goes_on]) == [True, True, True, False, True]
    assert "twice(-1)" in questions[2].question


@pytest.mark.parametrize("tests", ["assert True", [], [1], [" "]])
def test_tests_that_are_no_statements_are_refused_by_their_line(tmp_path: Path, tests: object) -> None:
    good = {"question": "a", "tests": ["assert True"]}
    with pytest.raises(ConfigError, match=r"tasks\.jsonl, line 2"):
        read_tasks(written(tmp_path / "tasks.jsonl", good, {"question": "b", "tests": tests}))
