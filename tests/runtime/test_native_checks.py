"""Native code under sanitizers, and for processors that are not at hand.

A driver in C++ (`tests/native`) runs passes, bursts, draws and policies with random and hostile inputs, and holds the
code to what it promises. It is built checked: every index is asserted.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import dash_runtime
from dash_runtime.native.levels import best_level, levels_here
from dash_runtime.native.recipe import LEVELS, Level
from tests.marks import long

SOURCES = Path(dash_runtime.__file__).parent / "native"
DRIVER = Path(__file__).parent.parent / "native" / "driver.cpp"
# Vectors of several registers are passed in another way at each level; nobody passes them from one to the other.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi")
# Without optimisation it compiles in a third of the time.
CHECKED = ("-std=c++17", "-O0", "-g", "-DDASH_CHECKED", "-ffp-contract=fast", "-fno-math-errno", "-pthread")
ADDRESSES = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)
SECONDS = 300


def compiler_of(level: Level) -> str:
    name = "g++" if level.machine == platform.machine() else f"{level.machine}-linux-gnu-g++"
    if (compiler := shutil.which(name)) is None:
        pytest.skip(f"needs {name}")
    return compiler


def built(folder: Path, level: Level, *options: str) -> str:
    """Returns the driver, built checked for a level."""
    program = str(folder / "driver")
    command = [compiler_of(level), *CHECKED, *WARNINGS, *level.flags, *options, f"-I{SOURCES}", "-o", program]
    subprocess.run([*command, str(DRIVER)], check=True, timeout=SECONDS)
    return program


def skip_without(folder: Path, options: Sequence[str]) -> None:
    """Skips where a program built so does not run: sanitizers are packages of their own, and need some kernels."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [compiler_of(best_level()), *options, str(source), "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True).returncode or subprocess.run([folder / "empty"]).returncode:
        pytest.skip(f"needs a compiler with {' '.join(options)}")


def assert_holds(*command: str) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, **output, env=environment, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (0, "all held\n"), done.stdout


OTHER_LEVELS = [level for level in LEVELS if level != best_level()]


@pytest.mark.parametrize("level", [best_level(), *long(OTHER_LEVELS)], ids=lambda level: level.name)
def test_the_sources_compile_without_a_warning(level: Level) -> None:
    for more in ((), ("-DDASH_CHECKED",)):
        command = [compiler_of(level), "-std=c++17", "-fopenmp", "-fsyntax-only", *WARNINGS, *level.flags, *more]
        subprocess.run([*command, str(SOURCES / "native.cpp")], check=True, timeout=SECONDS)


CHECKED_LEVELS = dict.fromkeys([best_level(), *(levels_here()[-1:] if "DASH_TEST_LEVEL" in os.environ else [])])
"""The best, which has intrinsics; with `make test-levels` the lowest, which has plain vectors, too."""


@pytest.mark.long
@pytest.mark.parametrize("level", CHECKED_LEVELS, ids=lambda level: level.name)
def test_no_memory_but_its_own_is_used_and_no_arithmetic_is_undefined(tmp_path: Path, level: Level) -> None:
    skip_without(tmp_path, ADDRESSES)
    assert_holds(built(tmp_path, level, *ADDRESSES))


@pytest.mark.long
def test_threads_use_nothing_that_another_one_writes_meanwhile(tmp_path: Path) -> None:
    skip_without(tmp_path, THREADS)
    assert_holds(built(tmp_path, best_level(), *THREADS))


@pytest.mark.long
@pytest.mark.parametrize(
    "level", [level for level in LEVELS if level.machine == "aarch64"], ids=lambda level: level.name
)
def test_it_holds_on_another_kind_of_processor(tmp_path: Path, level: Level) -> None:
    emulator = shutil.which(f"qemu-{level.machine}")
    if emulator is None:
        pytest.skip("needs qemu-user")
    assert_holds(emulator, built(tmp_path, level, "-static"))
