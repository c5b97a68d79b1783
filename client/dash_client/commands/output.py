"""Prints values as JSON, errors, and text for a terminal, the same way for all commands. Knows no command."""

import argparse
import os
import re
import sys
from dataclasses import fields, is_dataclass
from typing import Any, TextIO

from dash_client.errors import DashError
from dash_client.terminal import ColorDepth, without_control_characters
from dash_client.types import Action, Decisions

# `json` escapes the other control characters itself; a terminal would obey these.
_RAW_CONTROL = re.compile("[\x7f-\x9f]")


def print_json(value: Any) -> None:
    """Prints a value as one line of JSON."""
    import json

    line = json.dumps(as_json(value), ensure_ascii=False)
    print(_RAW_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line), flush=True)


def as_json(value: Any) -> Any:
    """Converts dataclasses to objects of the fields that they show, actions to names, and decisions to one list of
    action names per token."""
    if isinstance(value, Decisions):
        return [[action.name for action in row] for row in value]
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value) if field.repr}
    if isinstance(value, Action):
        return value.name
    if isinstance(value, dict):
        return {as_json(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value


def report_error(error: DashError, *, json: bool) -> None:
    """Prints an error on standard error and, with `json`, also as an object on standard output."""
    if json:
        print_json({"error": error_as_json(error)})
    sys.stdout.flush()
    say(f"dash-client: {error.message}")
    if error.retry_after_seconds is not None:
        say(f"dash-client: try again in {error.retry_after_seconds:g} s")
    if error.request_id:
        say(f"dash-client: the server's name for the request is {error.request_id}")


def error_as_json(error: DashError) -> dict[str, Any]:
    """Returns an error's attributes, for programs."""
    return {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "request_id": error.request_id,
        "field_violations": as_json(error.field_violations),
        "retry_after_seconds": error.retry_after_seconds,
    }


def say(text: str) -> None:
    """Prints a line for a person on standard error; never part of a command's result."""
    print(without_control_characters(text), file=sys.stderr, flush=True)


def printable(text: str, stream: TextIO) -> str:
    """Returns a model's or server's text for `stream`: without control characters on a terminal, else unchanged."""
    return without_control_characters(text) if stream.isatty() else text


def can_show(characters: str, stream: TextIO) -> bool:
    """Returns True if the stream's encoding has these characters."""
    try:
        characters.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def color_depth(arguments: argparse.Namespace, stream: TextIO) -> ColorDepth:
    """Returns the colours to use on `stream`, by `--color`, the environment and the kind of stream."""
    if arguments.color == "always":
        return ColorDepth.for_terminal(os.environ)
    return ColorDepth.NONE if arguments.color == "never" else ColorDepth.of(stream, os.environ)
