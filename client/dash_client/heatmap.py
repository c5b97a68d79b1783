"""Shows how many layers ran for each piece of text: as background colours, or as numbers.

Knows strings and numbers only; whether the terminal can show colours is decided in `ColorDepth.of`.
"""

import re
from collections.abc import Mapping
from enum import Enum
from typing import TextIO

from dash_client.types import StreamDelta

RESET = "\x1b[0m"
_LEGEND_STEPS = 6

# Few layers are dark violet, all layers yellow (after matplotlib's viridis, which keeps its order for
# the colour-blind and in grey).
_SCALE = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))

# A model's output must not be able to steer the terminal.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ColorDepth(Enum):
    """What a terminal can show."""

    NONE = "none"
    INDEXED = "indexed"
    TRUE = "true"

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str]) -> "ColorDepth":
        """What `stream` can show: nothing if it is no terminal, NO_COLOR is set, or TERM is dumb."""
        if not stream.isatty() or environment.get("NO_COLOR") or environment.get("TERM", "dumb") == "dumb":
            return cls.NONE
        return cls.for_terminal(environment)

    @classmethod
    def for_terminal(cls, environment: Mapping[str, str]) -> "ColorDepth":
        """What a terminal with this environment can show, if it shows colours."""
        return cls.TRUE if environment.get("COLORTERM") in ("truecolor", "24bit") else cls.INDEXED


def without_control_characters(text: str) -> str:
    """The text with control characters other than tab and line feed replaced."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def background(color: tuple[int, int, int], depth: ColorDepth) -> str:
    """What begins text on a background of this colour, in ink that can be read; nothing where there are no colours."""
    if depth is ColorDepth.NONE:
        return ""
    red, green, blue = color
    ink = 30 if is_light(color) else 97
    if depth is ColorDepth.TRUE:
        return f"\x1b[48;2;{red};{green};{blue};{ink}m"
    return f"\x1b[48;5;{16 + 36 * _cube(red) + 6 * _cube(green) + _cube(blue)};{ink}m"


def is_light(color: tuple[int, int, int]) -> bool:
    """Whether black is easier to read on it than white (ITU-R BT.601 luma)."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128


class DepthPainter:
    """Paints each delta's text by the mean number of layers that ran for its tokens.

    The scale goes from half the layers (or fewer) to all of them.
    """

    def __init__(self, layer_count: int, depth: ColorDepth) -> None:
        self._layer_count = layer_count
        self._depth = depth
        self._pending: list[int] = []

    def paint(self, delta: StreamDelta) -> str:
        """The delta's text, marked. Tokens without text of their own count towards the text that follows."""
        if delta.decisions is not None:
            self._pending += [delta.decisions.layers_run(token) for token in range(len(delta.decisions))]
        if not delta.text or not self._pending:
            return delta.text
        layers = sum(self._pending) / len(self._pending)
        self._pending = []
        if self._depth is ColorDepth.NONE:
            visible = delta.text.rstrip()
            return f"{visible}[{layers:.3g}]{delta.text[len(visible) :]}"
        start = self._start(layers)
        # Closed at every line's end, or the background would run to the edge of the screen.
        lines = (f"{start}{line}{RESET}" if line else "" for line in delta.text.split("\n"))
        return "\n".join(lines)

    def legend(self) -> str:
        """One line that explains the marks."""
        if self._depth is ColorDepth.NONE:
            return f"[n]: layers run for the text before it, of {self._layer_count}"
        low = self._layer_count / 2
        step = (self._layer_count - low) / (_LEGEND_STEPS - 1)
        values = [low + step * index for index in range(_LEGEND_STEPS)]
        boxes = "".join(f"{self._start(value)} {value:.0f} {RESET}" for value in values)
        return f"layers run, of {self._layer_count}: \N{LESS-THAN OR EQUAL TO}{boxes}"

    def _start(self, layers: float) -> str:
        return background(self._color(layers), self._depth)

    def _color(self, layers: float) -> tuple[int, int, int]:
        share = min(1.0, max(0.0, 2 * layers / self._layer_count - 1))
        position = share * (len(_SCALE) - 1)
        index = min(int(position), len(_SCALE) - 2)
        weight = position - index
        red, green, blue = (
            round(below + (above - below) * weight)
            for below, above in zip(_SCALE[index], _SCALE[index + 1], strict=True)
        )
        return red, green, blue


def _cube(channel: int) -> int:
    """The nearest of the six steps of the 256-colour cube: 0, 95, 135, …, 255."""
    return 0 if channel < 48 else min(5, max(1, round((channel - 55) / 40)))
