"""Reads a JSON object from a checkpoint's file, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        CheckpointNotFound: there is no such file.
        CorruptCheckpoint: it is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointNotFound(f"There is no file {path}.") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} holds no JSON object.")
    return value
