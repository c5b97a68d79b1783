"""Finds the code blocks of a Markdown file, and runs them as a reader would. Knows no server.

A comment on the line before a block says what is special about it:

    <!-- not run: a reason -->       the block is only shown
    <!-- first: client = … -->       this line runs before the block, for names that the text above it introduced
"""

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("python", "sh", "toml", "json", "text")
"""The languages of blocks; `text` is no code."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<code>.*?)^(?P=indent)```\s*$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!-- (?P<kind>not run|first): (?P<text>[^\n]*?) -->\s*\Z")
_SECONDS = 240

# The blocks of one file share a namespace, as in a session, and may await, as in `python -m asyncio`.
_RUNNER = """
import ast, asyncio, inspect, json, sys
namespace = {"__name__": "__main__"}
with asyncio.Runner() as runner:
    for place, code in json.load(sys.stdin):
        result = eval(compile(code, place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace)
        if inspect.iscoroutine(result):
            runner.run(result)
"""


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One fenced block; `place` is its file and line."""

    place: str
    language: str
    code: str
    why_not_run: str | None

    @property
    def is_run(self) -> bool:
        return self.language != "text" and self.why_not_run is None


def code_blocks(path: Path) -> list[CodeBlock]:
    """Returns the file's blocks, in order."""
    text = path.read_text()
    blocks = []
    for match in _FENCE.finditer(text):
        above = text[: match.start()]
        comment = _COMMENT.search(above)
        kind = comment["kind"] if comment else None
        code = textwrap.dedent(match["code"])
        if comment and kind == "first":
            code = f"{comment['text']}\n{code}"
        blocks.append(
            CodeBlock(
                f"{path.name}:{above.count(chr(10)) + 1}",
                match["language"],
                code,
                comment["text"] if comment and kind == "not run" else None,
            )
        )
    return blocks


def run_blocks(blocks: list[CodeBlock], folder: Path, target: str) -> None:
    """Runs the blocks in `folder`, against the server at `target`.

    Raises:
        AssertionError: a block failed; names it, with its output.
    """
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "DASH_TARGET": target,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "error::DeprecationWarning:__main__",
    }
    python = [(block.place, block.code) for block in blocks if block.is_run and block.language == "python"]
    if python:
        _run([sys.executable, "-c", _RUNNER], json.dumps(python), folder, environment, python[0][0])
    for block in blocks:
        if block.is_run and block.language == "sh":
            _run(["bash", "-euo", "pipefail", "-c", block.code], "", folder, environment, block.place)
        elif block.is_run and block.language == "toml":
            tomllib.loads(block.code)
        elif block.is_run and block.language == "json":
            json.loads(block.code)


def _run(command: list[str], stdin: str, folder: Path, environment: dict[str, str], place: str) -> None:
    result = subprocess.run(
        command,
        input=stdin,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert result.returncode == 0, f"{place} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
