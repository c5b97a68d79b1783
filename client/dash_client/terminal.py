"""Text on a terminal: coloured backgrounds, and no control characters from others.

Knows strings and the environment; knows nothing of what the text means.
"""

import re
from collections.abc import Mapping
from enum import Enum
from typing import TextIO

RESET = "\x1b[0m"

# A model's output must not control the terminal.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ColorDepth(Enum):
    """The colours that a terminal can show."""

    NONE = "none"
    INDEXED = "indexed"
    TRUE = "true"

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str]) -> "ColorDepth":
        """Returns what `stream` can show: no colours if it is not a terminal, NO_COLOR is set, or TERM is dumb."""
        if not stream.isatty() or environment.get("NO_COLOR") or environment.get("TERM", "dumb") == "dumb":
            return cls.NONE
        return cls.for_terminal(environment)

    @classmethod
    def for_terminal(cls, environment: Mapping[str, str]) -> "ColorDepth":
        """Returns what a terminal with this environment can show, given that it shows colours."""
        return cls.TRUE if environment.get("COLORTERM") in ("truecolor", "24bit") else cls.INDEXED


def without_control_characters(text: str) -> str:
    """Returns the text with control characters other than tab and line feed replaced."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def background(color: tuple[int, int, int], depth: ColorDepth) -> str:
    """Returns the escape sequence for this background with readable ink; empty without colours."""
    if depth is ColorDepth.NONE:
        return ""
    red, green, blue = color
    ink = 30 if _is_light(color) else 97
    if depth is ColorDepth.TRUE:
        return f"\x1b[48;2;{red};{green};{blue};{ink}m"
    return f"\x1b[48;5;{16 + 36 * _cube(red) + 6 * _cube(green) + _cube(blue)};{ink}m"


def _is_light(color: tuple[int, int, int]) -> bool:
    """Returns True if black is easier to read on it than white (ITU-R BT.601 luma)."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128


def _cube(channel: int) -> int:
    """Returns the nearest of the six steps of the 256-colour cube: 0, 95, 135, …, 255."""
    return 0 if channel < 48 else min(5, max(1, round((channel - 55) / 40)))
