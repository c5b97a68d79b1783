"""Reads the output of `heatmap --json` or `generate --json --show-depth`. Trusts nothing in it. Knows no server."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash_client.commands.heatmap_rows import Row, label_of, rows_of_piece
from dash_client.errors import invalid_argument
from dash_client.types import Action

_MAX_BYTES = 64 << 20
"""About 250,000 tokens of 30 layers."""


@dataclass(frozen=True, slots=True)
class SavedHeatmap:
    """The rows of an earlier answer."""

    rows: list[Row]
    layer_count: int
    title: str
    content: dict[str, Any]
    """The whole content of the file."""

    @staticmethod
    def title_of(model: str, mode: str, mean_cost: float | None) -> str:
        """Returns the title of a picture."""
        cost = "" if mean_cost is None else f", mean cost {mean_cost:.3f} of full depth"
        return f"{model}, {mode.replace('_', ' ')}{cost}"


def load_heatmap(path: Path) -> SavedHeatmap:
    """Reads the rows in a file; `-` is standard input.

    Raises:
        InvalidArgumentError: the file cannot be read, or is of another kind.
    """
    try:
        return _saved(json.loads(_read(path)))
    except OSError as error:
        raise invalid_argument(str(path), f"cannot be read: {error.strerror}") from None
    except _Damaged as error:
        raise invalid_argument(str(path), str(error)) from None
    except (ValueError, RecursionError):
        raise invalid_argument(str(path), "holds no JSON that heatmap --json printed") from None


class _Damaged(Exception):
    """The file is damaged; the message says how."""


def _read(path: Path) -> bytes:
    if str(path) == "-" and sys.stdin is not None:
        content = sys.stdin.buffer.read(_MAX_BYTES + 1)
    else:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise _Damaged(f"is larger than {_MAX_BYTES >> 20} MiB")
    return content


def _saved(content: Any) -> SavedHeatmap:
    if not isinstance(content, dict):
        raise ValueError
    decisions = content.get("decisions")
    if decisions is None and "text" in content:
        raise _Damaged("holds an answer without decisions: ask for them, by heatmap --json or generate --show-depth")
    actions = [_actions(row) for row in _list(decisions)]
    layer_counts = {len(row) for row in actions}
    if len(layer_counts) != 1:
        raise _Damaged("holds no decisions, or not of the same layers for all tokens")
    return SavedHeatmap(_rows(content, actions), layer_counts.pop(), _title(content), content)


def _actions(row: Any) -> tuple[Action, ...]:
    names = _list(row)
    if not names or not all(isinstance(name, str) and name in Action.__members__ for name in names):
        raise _Damaged("holds an action that there is not")
    return tuple(Action[name] for name in names)


def _rows(content: dict[str, Any], actions: list[tuple[Action, ...]]) -> list[Row]:
    if "pieces" in content:
        pieces = [_piece(piece) for piece in _list(content["pieces"])]
        if sum(count for _, count in pieces) != len(actions):
            raise _Damaged("holds pieces of other tokens than those with decisions")
        rest = iter(actions)
        return [row for text, count in pieces for row in rows_of_piece(text, [next(rest) for _ in range(count)])]
    # `generate` prints only the whole text, so the text of each token is unknown.
    token_ids = _list(content.get("token_ids"))
    if len(token_ids) != len(actions) or not all(type(token_id) is int for token_id in token_ids):
        raise _Damaged("holds other tokens than those with decisions")
    return [Row(str(token_id), row) for token_id, row in zip(token_ids, actions, strict=True)]


def _piece(piece: Any) -> tuple[str, int]:
    if not isinstance(piece, dict):
        raise ValueError
    text, count = piece.get("text"), piece.get("token_count")
    if not isinstance(text, str) or type(count) is not int or count < 0:
        raise ValueError
    return text, count


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


def _title(content: dict[str, Any]) -> str:
    started, depth = content.get("started"), content.get("depth")
    model = started.get("model") if isinstance(started, dict) else None
    mode = started.get("mode") if isinstance(started, dict) else None
    cost = depth.get("mean_cost") if isinstance(depth, dict) else None
    return SavedHeatmap.title_of(
        label_of(model) if isinstance(model, str) else "an answer",
        label_of(mode) if isinstance(mode, str) else "of unknown mode",
        cost if isinstance(cost, float) else None,
    )
