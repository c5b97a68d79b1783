"""Schemas and grammars are checked where they can harm nobody."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.errors import InvalidRequest
from dash_server.grammar_check import GrammarChecker

GOOD = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object", "properties": {"a": {"type": "string"}}}')
PATTERNS = [{"type": "string", "pattern": f"(a{n}|b)*x(a|b){{{n + 10}}}"} for n in range(40)]
DEADLY = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps({"allOf": PATTERNS}))
"""Two kilobytes that take minutes, and all memory there is."""


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(1, seconds=1.0)
    yield checker
    checker.close()


def test_what_is_wrong_is_named_as_by_the_library(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    with pytest.raises(InvalidRequest) as error:
        checker.check(Constraint(ConstraintKind.JSON_SCHEMA, '{"properties": {"a": {"type": "nothing"}}}', "mine"))
    assert error.value.field == "mine"
    assert "#/properties/a" in error.value.description


def test_a_deadly_schema_is_refused_in_time_and_the_next_one_is_checked(checker: GrammarChecker) -> None:
    checker.check(GOOD)
    began, resident_before = time.monotonic(), psutil.Process().memory_info().rss
    with pytest.raises(InvalidRequest, match=r"constraint\.json_schema.*too much time or memory"):
        checker.check(DEADLY)
    assert time.monotonic() - began < 5
    assert psutil.Process().memory_info().rss < resident_before + (256 << 20)
    checker.check(GOOD)


def test_a_process_that_was_killed_is_replaced(checker: GrammarChecker) -> None:
    others = psutil.Process().children()
    checker.check(GOOD)
    (child,) = set(psutil.Process().children()) - set(others)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    checker.check(GOOD)
    checker.close()
    assert not set(psutil.Process().children()) - set(others)


def test_a_check_ends_with_the_process_that_wants_it() -> None:
    program = (
        "import sys; from dash_runtime.constraint import *; from dash_server.grammar_check import GrammarChecker; "
        "GrammarChecker(1, seconds=60).check(Constraint(ConstraintKind.JSON_SCHEMA, sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", program, DEADLY.text]) as process:
        server, checking = psutil.Process(process.pid), None
        until = time.monotonic() + 20
        while checking is None and time.monotonic() < until:
            checking = next((own for own in server.children() if own.cpu_times().user > 0.4), None)
            time.sleep(0.02)
        assert checking is not None
        process.kill()
    psutil.wait_procs([checking], timeout=5)
    assert not checking.is_running() or checking.status() == psutil.STATUS_ZOMBIE
