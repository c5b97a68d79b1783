"""Reads the texts and JSON objects of a checkpoint, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint
from dash_runtime.files.atomic_file import require_regular_file
from dash_runtime.files.wording import one_line, quoted

MAX_TEXT_BYTES = 64 * 2**20
"""Far more than any model's texts have; a damaged file may be of any size."""


def read_text(path: Path) -> str:
    """Returns the UTF-8 text in `path`.

    Raises:
        CheckpointNotFound: there is no such file.
        CorruptCheckpoint: it is no regular file of up to `MAX_TEXT_BYTES`, or not UTF-8.
    """
    try:
        size_bytes = require_regular_file(path)
        if size_bytes > MAX_TEXT_BYTES:
            raise CorruptCheckpoint(f"{path} has {size_bytes} bytes, more than the {MAX_TEXT_BYTES} that are read.")
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFound(f"There is no file {path}.") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{path} is not UTF-8 text ({one_line(error)}).") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in `path`.

    Raises:
        CheckpointNotFound: there is no such file.
        CorruptCheckpoint: it is not JSON, not an object, or has two values for one key.
    """
    text = read_text(path)
    try:
        value = parse_json(text)
        if "\\ud" in text or "\\uD" in text:  # half of a surrogate pair is JSON when it is escaped, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is not valid JSON ({one_line(error)}).") from None
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} holds no JSON object.")
    return value


def parse_json(text: str) -> Any:
    """Returns the value in `text`.

    Raises:
        RecursionError, ValueError: it is not JSON, or has two values for one key.
    """
    return json.loads(text, object_pairs_hook=_unambiguous)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses two values for one key: Python would take the last, other readers take the first."""
    value = dict(pairs)
    if len(value) < len(pairs):
        for key, other in pairs:
            if value[key] != other:
                raise ValueError(f"it has two values for {quoted(key)}")
    return value
