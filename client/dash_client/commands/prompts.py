"""Reads prompts from the command line and from standard input. Knows no server."""

import argparse
import sys
from collections.abc import Iterator

from dash_client.errors import invalid_argument
from dash_client.options import Prompt
from dash_client.types import ChatMessage


def prompt_of(arguments: argparse.Namespace) -> Prompt:
    """Returns the prompt to send: one user message, or plain text with `--raw`.

    Raises:
        InvalidArgumentError: the prompt is `-`, and standard input is closed or not text.
    """
    text = read_text() if arguments.prompt == "-" else arguments.prompt
    return text if arguments.raw else [ChatMessage(role="user", content=text)]


def read_text() -> str:
    """Reads all of standard input.

    Raises:
        InvalidArgumentError: it is closed, or not text in the terminal's encoding.
    """
    return "".join(read_lines())


def read_lines() -> Iterator[str]:
    """Yields the lines of standard input as they come, with their line ends.

    Raises:
        InvalidArgumentError: it is closed, or not text in the terminal's encoding.
    """
    # Python sets it to None if it was closed at the start.
    if sys.stdin is None:
        raise invalid_argument("standard input", "is closed")
    try:
        while line := sys.stdin.readline():
            yield line
    except UnicodeDecodeError as error:
        reason = f"is not {error.encoding} text: {error.reason} at byte {error.start}"
        raise invalid_argument("standard input", reason) from None
