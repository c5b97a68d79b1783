"""The levels of processors that native code is compiled for, and which of them this machine has.

Knows features and a compiler's flags; compiles nothing.
"""

import platform
from functools import lru_cache
from typing import NamedTuple

from dash_runtime.devices.processor import first_processor


class Level(NamedTuple):
    """A level: the flags that name it to the compiler, and the features that a processor of that kind needs for it, by
    the system's names."""

    name: str
    machine: str
    flags: tuple[str, ...]
    features: frozenset[str]

    def is_here(self) -> bool:
        """Returns True if this machine runs code of the level."""
        return self.machine == platform.machine() and self.features <= set(processor_features().split())


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


def levels_here() -> list[Level]:
    """Returns the levels that this machine has, the best first; none if nobody knows its features."""
    return [level for level in LEVELS if level.is_here()]


def best_level() -> Level:
    """Returns the best level that this machine has."""
    return next(iter(levels_here()), NATIVE)


@lru_cache
def processor_features() -> str:
    """Returns the features of the processor by the system's names, or the kind of machine if nobody tells."""
    lines = (line.partition(":")[2] for line in first_processor() if line.startswith(("flags", "Features")))
    return next(lines, platform.machine())
