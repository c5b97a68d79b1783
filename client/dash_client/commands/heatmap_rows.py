"""The rows of a heatmap, and its lines in a terminal: one per token, with a cell per layer. Knows no server or file.

A server sends text in pieces, and a piece may complete several tokens. Its text then labels the last of them.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dash_client.terminal import RESET, ColorDepth, background, without_control_characters
from dash_client.types import Action

# The trace page's colours: a skip is orange; work is blue, and darker the more it is. The order in lightness survives
# colour blindness.
COLORS = {
    Action.SKIP: (240, 148, 58),
    Action.INT3: (218, 233, 247),
    Action.INT4: (185, 214, 240),
    Action.INT8: (107, 165, 217),
    Action.FULL: (35, 85, 143),
}
LETTERS = {Action.SKIP: ".", Action.INT3: "3", Action.INT4: "4", Action.INT8: "8", Action.FULL: "F"}

LABEL_WIDTH = 14
_RULER_STEP = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One token."""

    label: str
    """Its text on one line, or its id if the text is unknown; empty if a later token completes the text."""
    actions: tuple[Action, ...]


def rows_of_piece(text: str, decisions: Sequence[tuple[Action, ...]]) -> list[Row]:
    """Returns the rows of the tokens that complete this text."""
    last = len(decisions) - 1
    return [Row(label_of(text) if token == last else "", actions) for token, actions in enumerate(decisions)]


def label_of(text: str) -> str:
    """Returns the text on one line, without control characters."""
    # A file may hold lone surrogates, which cannot be printed.
    whole = text.encode("utf-8", "replace").decode()
    return without_control_characters(whole.replace("\n", "\\n").replace("\t", "\\t"))


class RowPainter:
    """Formats the lines of a heatmap."""

    def __init__(self, layer_count: int, depth: ColorDepth) -> None:
        self._layer_count = layer_count
        self._depth = depth

    def legend(self) -> str:
        """Returns one line that explains the cells."""
        cells = (f"{self._cells((action,))} {action.name.lower()}" for action in Action)
        return f"a line for each token, a column for each of {self._layer_count} layers: {', '.join(cells)}"

    def ruler(self) -> str:
        """Returns a line of layer numbers, from 0, above their columns."""
        marks = "".join(f"{layer:<{_RULER_STEP}}" for layer in range(0, self._layer_count, _RULER_STEP))
        return f"{'':{LABEL_WIDTH}} {marks[: self._layer_count].rstrip()}"

    def line(self, row: Row) -> str:
        """Returns the line of one token."""
        return f"{_fitted(row.label, LABEL_WIDTH)} {self._cells(row.actions)}"

    def _cells(self, actions: Iterable[Action]) -> str:
        # Letters in addition to colours, which not everybody can tell apart.
        cells = []
        before = None
        for action in actions:
            cells.append("" if action is before else background(COLORS[action], self._depth))
            cells.append(LETTERS[action])
            before = action
        return "".join(cells) + (RESET if self._depth is not ColorDepth.NONE else "")


def _fitted(text: str, width: int) -> str:
    """Returns the text, cut or padded to this number of terminal columns."""
    columns = 0
    kept = ""
    for character in text:
        step = _columns(character)
        if columns + step > width:
            break
        kept += character
        columns += step
    return kept + " " * (width - columns)


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
