"""Runs the programs that a model has written against their tests, each in a process of its own that has no network, a
folder of its own, and little time, memory and disk.

A process is no wall against a program that looks for a way out: what may be malicious belongs into a container. Knows
programs; knows no models.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dash_runtime.errors import ConfigError
from dash_runtime.evaluation import program_child

_SECONDS = 20.0
_LIMITS = {"RLIMIT_CPU": 10, "RLIMIT_AS": 1 << 30, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_NPROC": 16, "RLIMIT_CORE": 0}
_COMMAND = (sys.executable, "-I", "-S", program_child.__file__)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def code_in(text: str) -> str:
    """Returns the code of an answer: its first fenced block, of which the end may be missing, or else all of it."""
    block = _BLOCK.search(text)
    return block[1] if block is not None else text


def require_isolation() -> None:
    """Tries to keep a program from the network.

    Raises:
        ConfigError: that cannot be done here.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError("tasks", "has programs to run; they are kept from the network on Linux only")
    which_pass([""])


def which_pass(sources: Sequence[str], seconds: float = _SECONDS) -> list[bool]:
    """Returns for each program whether it runs to its end, without an error, within the limits.

    Raises:
        ConfigError: programs cannot be kept from the network here.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda source: _passes(source, seconds), sources))


def _passes(source: str, seconds: float) -> bool:
    word = secrets.token_hex(16)
    task = json.dumps({"source": source, "limits": _LIMITS, "word": word}).encode()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            _COMMAND, cwd=folder, env={"HOME": folder}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(task, seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.kill()
            process.communicate()
    if process.returncode == program_child.NO_ISOLATION and not output:
        raise ConfigError(
            "tasks", "has programs to run, and this machine makes no namespace without a network for them"
        )
    return output == word.encode()
