"""The examples in Go and Java, built and run against a real `dash-server` process with the fake worker.

They fetch packages and compile for about a minute at first, so they run only on demand:

    DASH_TEST_LANGUAGES=1 .venv/bin/python -m pytest tests/e2e/test_other_languages.py
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dash_client import DashClient
from tests.server.server_harness import fake_model, server_process, write_model_folder, write_tokens

pytestmark = pytest.mark.skipif(
    "DASH_TEST_LANGUAGES" not in os.environ, reason="builds for a minute; set DASH_TEST_LANGUAGES=1"
)

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 500
RUN_SECONDS = 60
TOKEN = "a token of the test"

_MAVEN = ("mvn", "--batch-mode", "--quiet")
# Maven resets the terminal's colours, whatever its options are.
_COLOURS = re.compile(r"\x1b\[\d*m")
# What go and mvn say if they reach no registry.
_OFFLINE = re.compile("dial tcp|disabled by GOPROXY|Could not transfer artifact|failed to transfer|in offline mode")


@dataclass(frozen=True)
class Language:
    """An example's toolchain: the programs that it needs, its steps, and the command that runs it."""

    programs: tuple[str, ...]
    build: tuple[tuple[str, ...], ...]
    run: Callable[[str], tuple[str, ...]]


LANGUAGES = {
    "go": Language(
        ("go",),
        (("./generate.sh",), ("go", "build", "-o", "bin/example", ".")),
        lambda target: ("bin/example", target),
    ),
    "java": Language(
        ("mvn", "java"),
        ((*_MAVEN, "compile"),),
        lambda target: (*_MAVEN, "exec:java", f"-Dexec.args={target}"),
    ),
}


@dataclass(frozen=True)
class Example:
    """A built example, in a copy of its folder."""

    language: Language
    folder: Path

    def output(self, port: int, expected_code: int = 0, token: str = "") -> str:
        """Runs it against the server at `port`, and returns what it printed."""
        result = run(self.language.run(f"localhost:{port}"), self.folder, RUN_SECONDS, DASH_TOKEN=token)
        assert result.returncode == expected_code, result.stdout
        return _COLOURS.sub("", result.stdout)


def run(command: tuple[str, ...], folder: Path, seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command; returns its exit code and all its output."""
    # No proxy may stand between a client and a server on this machine.
    environment = os.environ | {"no_proxy": "localhost", "NO_PROXY": "localhost", "PYTHON": sys.executable}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=seconds,
        check=False,
    )


@pytest.fixture(scope="module", params=LANGUAGES)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    """The example in one language, built in a copy, so that nothing is generated here."""
    language = LANGUAGES[request.param]
    if missing := [program for program in language.programs if shutil.which(program) is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine")
    root = tmp_path_factory.mktemp(request.param)
    shutil.copytree(ROOT / "proto", root / "proto", ignore=shutil.ignore_patterns("*.py", "*.pyi", "__pycache__"))
    # A reader's own build may lie in the folder; none of it is copied.
    generated = shutil.ignore_patterns("bin", "dash_api", "target", "dashexample")
    folder = shutil.copytree(ROOT / "examples" / request.param, root / "examples" / request.param, ignore=generated)
    for step in language.build:
        result = run(step, folder, BUILD_SECONDS)
        if result.returncode != 0 and _OFFLINE.search(result.stdout):
            pytest.skip(f"{request.param} cannot fetch its packages: no network")
        assert result.returncode == 0, result.stdout
    return Example(language, folder)


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[int]:
    """Runs a server with one slot, which echoes the prompt up to its first end of a message. Yields the port."""
    model = fake_model(write_model_folder(folder / "model"), token_seconds=0.01)
    with server_process(folder, model=model, slots=1, **settings) as server:
        port = server.wait_for_port()
        with DashClient(f"localhost:{port}") as client:
            client.wait_until_ready()
        yield port


def test_health_a_stream_a_cancellation_and_a_refusal(example: Example, tmp_path: Path) -> None:
    with serving(tmp_path, token_file=write_tokens(tmp_path, test=TOKEN)) as port:
        output = example.output(port, token=TOKEN)
    assert re.fullmatch(
        r"health: SERVING\n"
        r".*Why is the sky blue\?.*"
        r"\nfinished: FINISH_REASON_END_OF_SEQUENCE, \d+\.\d tokens a second\n"
        r"cancelled stream: CANCELLED\n"
        r"INVALID_ARGUMENT: .*"
        r"\n  reason: INVALID_REQUEST\n"
        r".*  field: parameters\.sampling\.temperature: .*",
        output,
        re.DOTALL,
    ), output


def test_a_full_server_says_when_to_come_back(example: Example, tmp_path: Path) -> None:
    with (
        serving(tmp_path, max_queue=0) as port,
        DashClient(f"localhost:{port}") as client,
        client.stream("abc", max_new_tokens=4000) as stream,
    ):
        next(iter(stream))
        output = example.output(port, expected_code=1)
    assert re.fullmatch(
        r"health: SERVING\nRESOURCE_EXHAUSTED: .*\n  reason: QUEUE_FULL\n  retry after: \d+\.\d{3} s\n", output
    ), output
