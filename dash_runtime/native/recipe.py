"""The recipe of native code: its sources, the flags that compile it, and the levels of processors that it is for.

Imports nothing but Python's own: the build of a wheel (`hatch_build.py`) reads this file by itself.
"""

import hashlib
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "native.cpp"
_SECONDS = 300


class Level(NamedTuple):
    """A level: the flags that name it to the compiler, and the features that a processor of that kind needs for it, by
    the system's names."""

    name: str
    machine: str
    flags: tuple[str, ...]
    features: frozenset[str]


_V3 = "avx2 fma bmi1 bmi2 f16c movbe abm"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"
_VNNI_FLAGS = ("-march=x86-64-v4", "-mavx512vnni")
_BF16_FLAGS = (*_VNNI_FLAGS, "-mavx512bf16")
_AMX_FLAGS = (*_BF16_FLAGS, "-mamx-tile", "-mamx-int8", "-mamx-bf16")


def _level(name: str, machine: str, flags: tuple[str, ...], features: str) -> Level:
    return Level(name, machine, flags, frozenset(features.split()))


LEVELS = (
    _level("amx", "x86_64", _AMX_FLAGS, f"{_V4} avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16"),
    _level("avx512-bf16", "x86_64", _BF16_FLAGS, f"{_V4} avx512_vnni avx512_bf16"),
    _level("avx512-vnni", "x86_64", _VNNI_FLAGS, f"{_V4} avx512_vnni"),
    _level("x86-64-v4", "x86_64", ("-march=x86-64-v4",), _V4),
    _level("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3),
    _level("armv8.2-dotprod", "aarch64", ("-march=armv8.2-a+dotprod",), "asimddp asimdrdm atomics crc32"),
    _level("armv8", "aarch64", ("-march=armv8-a",), "asimd"),
)
"""All levels, the best first. They have all that the sources look for and intrinsics need."""
NATIVE = Level("native", platform.machine(), ("-march=native",), frozenset())
"""Whatever the compiler finds, on a machine of no level."""


def flags_for(level: Level) -> tuple[str, ...]:
    """Returns the compiler's flags for a level."""
    return (
        *("-std=c++17", "-O3", "-shared", "-fPIC"),
        # Left alone, compilers prefer half of AVX-512's width.
        *(("-mprefer-vector-width=512",) if level.machine == "x86_64" else ()),
        # A product and the sum that it is added to are one instruction. Compilers see only those that lie in one block
        # of their own: where kernels could differ in that, the instruction is named.
        *("-ffp-contract=fast", "-fno-math-errno"),
        *level.flags,
    )


def code_digest(level: Level, features: str = "") -> str:
    """Returns 16 digits that change if the level's native code does. For `NATIVE` it depends on the processor's
    features, too."""
    key = _sources(), flags_for(level), features if level is NATIVE else None
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def code_name(level: Level, features: str = "") -> str:
    """Returns the name of a level's native code, in files and in what a start says; the rest as in `code_digest`."""
    return f"rows-{level.name}-{code_digest(level, features)}"


@cache
def _sources() -> list[str]:
    return [file.read_text() for file in (_SOURCE, *sorted(_FOLDER.glob("*.h")))]


def compile_code(compiler: Sequence[str], level: Level, library: Path) -> None:
    """Compiles a level's native code.

    Raises:
        OSError: there is no such compiler.
        subprocess.SubprocessError: it failed, or took longer than minutes.
    """
    command = [*compiler, *flags_for(level), "-o", str(library), str(_SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
