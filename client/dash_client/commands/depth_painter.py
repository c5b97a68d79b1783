"""Marks each piece of text by the number of layers that ran for it: as background colours, or as numbers.

Knows strings and numbers only; `ColorDepth` decides whether the terminal can show colours.
"""

from dash_client.terminal import RESET, ColorDepth, background
from dash_client.types import StreamDelta

_LEGEND_STEPS = 6

# Few layers are dark violet, all layers yellow. The scale follows matplotlib's viridis: its order survives colour
# blindness and greyscale.
_SCALE = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))


class DepthPainter:
    """Paints each delta's text by the mean number of layers that ran for its tokens.

    The scale goes from half the layers (or fewer) to all of them.
    """

    def __init__(self, layer_count: int, depth: ColorDepth) -> None:
        self._layer_count = layer_count
        self._depth = depth
        self._pending: list[int] = []

    def paint(self, delta: StreamDelta) -> str:
        """Returns the delta's text, marked. Tokens without text count towards the text that follows."""
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
        # Reset at the end of each line, or the background would extend to the edge of the screen.
        lines = (f"{start}{line}{RESET}" if line else "" for line in delta.text.split("\n"))
        return "\n".join(lines)

    def legend(self) -> str:
        """Returns one line that explains the marks."""
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
