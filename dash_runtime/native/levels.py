"""Which levels of native code this machine has. Knows features; compiles nothing."""

import platform
from functools import lru_cache

from dash_runtime.devices.processor import first_processor
from dash_runtime.native.recipe import LEVELS, NATIVE, Level


def is_here(level: Level) -> bool:
    """Returns True if this machine runs code of the level."""
    return level.machine == platform.machine() and level.features <= set(processor_features().split())


def levels_here() -> list[Level]:
    """Returns the levels that this machine has, the best first; none if nobody knows its features."""
    return [level for level in LEVELS if is_here(level)]


def best_level() -> Level:
    """Returns the best level that this machine has."""
    return next(iter(levels_here()), NATIVE)


@lru_cache
def processor_features() -> str:
    """Returns the features of the processor by the system's names, or the kind of machine if nobody tells."""
    lines = (line.partition(":")[2] for line in first_processor() if line.startswith(("flags", "Features")))
    return next(lines, platform.machine())
