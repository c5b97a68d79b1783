"""Reads and writes files of recorded decisions, as protobuf JSON. Knows no server."""

import os
from pathlib import Path

from google.protobuf import json_format

from dash_api.v1 import model_pb2
from dash_client.decision_trace import RecordedDecisions
from dash_client.errors import invalid_argument
from dash_client.terminal import without_control_characters
from dash_client.trace.decision_trace_messages import decisions_from_message, message_from_decisions

_MAX_BYTES = 64 << 20
"""About ten thousand steps of 30 layers, far more than a server records."""

_MAX_ERROR_CHARS = 200


def save_decisions(decisions: RecordedDecisions, path: Path) -> None:
    """Writes a file that `load_decisions` reads.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    write_text(path, json_format.MessageToJson(message_from_decisions(decisions)))


def load_decisions(path: Path) -> RecordedDecisions:
    """Reads a file that `save_decisions` wrote.

    Raises:
        InvalidArgumentError: the file cannot be read, or holds something else; the message names it.
    """
    if not os.path.isfile(path):  # unlike pathlib, os.path accepts names that no file can have
        raise invalid_argument(str(path), "is no file" if os.path.exists(path) else "there is no such file")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        return decisions_from_message(json_format.Parse(text, model_pb2.GetDecisionsResponse()))
    except OSError as error:
        raise invalid_argument(str(path), f"cannot be read: {error.strerror}") from None
    except (json_format.Error, ValueError, RecursionError) as error:
        what = without_control_characters(" ".join(str(error).split()))[:_MAX_ERROR_CHARS]
        raise invalid_argument(str(path), f"holds no recorded decisions, or damaged ones: {what}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file, or overwrites it.

    Raises:
        InvalidArgumentError: the file cannot be written; the message names it.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise invalid_argument(str(path), f"cannot be written: {error.strerror}") from None
