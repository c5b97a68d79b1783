"""Draws a heatmap as a PNG: tokens across, layers down, in bands below each other. Needs Pillow; knows no server."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_client.commands.extras import missing_extra
from dash_client.commands.heatmap_rows import COLORS, Row
from dash_client.errors import invalid_argument
from dash_client.types import Action

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_CELL = 16
_GAP = 1
_MARGIN = 24
_AXIS_WIDTH = 44
_LABEL_HEIGHT = 110
_TITLE_HEIGHT = 62
_TOKENS_PER_BAND = 64
_MAX_TOKENS = 1024
"""The most tokens in a picture; `write_picture` reports how many there were."""

_MAX_LAYERS = 512

_FONT_SIZE = 13
# These cover more scripts than the font inside Pillow, which is the fallback.
_FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
_INK, _MUTED, _PAPER = (27, 31, 36), (92, 102, 112), (255, 255, 255)


def require_pillow() -> None:
    """Checks that Pillow is installed.

    Raises:
        InvalidArgumentError: it is not.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise missing_extra("--png", "Pillow") from None


def write_picture(rows: Sequence[Row], path: Path, title: str) -> str:
    """Writes the picture, or overwrites it; returns a sentence about the file.

    Raises:
        InvalidArgumentError: the file cannot be written, or there is nothing to draw.
    """
    if not rows:
        raise invalid_argument("--png", "there are no tokens to draw")
    if len(rows[0].actions) > _MAX_LAYERS:
        raise invalid_argument("--png", f"a picture has room for {_MAX_LAYERS} layers")
    shown = rows[:_MAX_TOKENS]
    picture = _picture(shown, title)
    try:
        picture.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise invalid_argument(str(path), f"cannot be written: {error.strerror or error}") from None
    rest = f", the first of {len(rows)}" if len(rows) > len(shown) else ""
    return f"wrote {path}: {len(shown)} tokens{rest}, {len(rows[0].actions)} layers"


def _picture(rows: Sequence[Row], title: str) -> Any:
    from PIL import Image, ImageDraw

    font = _font()
    layer_count = len(rows[0].actions)
    bands = [rows[start : start + _TOKENS_PER_BAND] for start in range(0, len(rows), _TOKENS_PER_BAND)]
    band_height = _LABEL_HEIGHT + layer_count * _CELL + _MARGIN
    # At least as wide as the legend.
    columns = max(len(bands[0]), 26)
    size = (2 * _MARGIN + _AXIS_WIDTH + columns * _CELL, _TITLE_HEIGHT + _MARGIN + len(bands) * band_height)
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=font)
    _draw_legend(draw, font)
    for index, band in enumerate(bands):
        top = _TITLE_HEIGHT + _MARGIN + index * band_height + _LABEL_HEIGHT
        _draw_axis(draw, font, top, layer_count)
        for column, row in enumerate(band):
            left = _MARGIN + _AXIS_WIDTH + column * _CELL
            _draw_cells(draw, left, top, row.actions)
            _paste_label(picture, font, left, top, row.label)
    return picture


def _font() -> Any:
    from PIL import ImageFont

    for name in _FONTS:
        try:
            return ImageFont.truetype(name, _FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(_FONT_SIZE)


def _draw_legend(draw: "ImageDraw", font: Any) -> None:
    left = _MARGIN
    top = _MARGIN + 26
    for action in Action:
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), fill=COLORS[action])
        draw.text((left + _CELL + 6, top), action.name.lower(), fill=_INK, font=font)
        left += 90


def _draw_axis(draw: "ImageDraw", font: Any, top: int, layer_count: int) -> None:
    for layer in range(0, layer_count, 5):
        right = _MARGIN + _AXIS_WIDTH - 8
        draw.text((right, top + layer * _CELL + _CELL // 2), str(layer), fill=_MUTED, font=font, anchor="rm")
    draw.text((_MARGIN, top - 8), "layer", fill=_MUTED, font=font, anchor="lb")


def _draw_cells(draw: "ImageDraw", left: int, top: int, actions: Sequence[Action]) -> None:
    for layer, action in enumerate(actions):
        upper = top + layer * _CELL
        draw.rectangle((left, upper, left + _CELL - 1 - _GAP, upper + _CELL - 1 - _GAP), fill=COLORS[action])


def _paste_label(picture: Any, font: Any, left: int, top: int, label: str) -> None:
    """Draws the token's text above its column, from bottom to top."""
    from PIL import Image, ImageDraw

    text = label.strip()
    if not text:
        return
    line = Image.new("RGB", (_LABEL_HEIGHT - 12, _CELL), _PAPER)
    ImageDraw.Draw(line).text((0, _CELL // 2), text, fill=_INK, font=font, anchor="lm")
    upright = line.rotate(90, expand=True)
    picture.paste(upright, (left, top - upright.height - 4))
