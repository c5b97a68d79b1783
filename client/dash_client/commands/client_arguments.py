"""Turns command-line options into a client and the options of its calls. Knows no command."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dash_client.client import DashClient
from dash_client.connection import ConnectionOptions
from dash_client.errors import invalid_argument
from dash_client.options import GenerationOptions
from dash_client.types import Mode

_MAX_TOKEN_BYTES = 16 << 10
"""Far more than a header may hold; avoids reading a large wrong file."""


def connect(arguments: argparse.Namespace) -> DashClient:
    """Returns a client for the server that the arguments name.

    Raises:
        InvalidArgumentError: an option is wrong, or a file cannot be read.
    """
    return DashClient(**connection_options(arguments))


def connection_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments for a client, sync or async, without those that were not given.

    Raises:
        InvalidArgumentError: the token file cannot be read, or holds no token.
    """
    given: dict[str, Any] = _given(arguments, ("target", "timeout", *ConnectionOptions.__annotations__))
    if arguments.token_file is not None:
        given["token"] = _read_token(arguments.token_file)
    return given


def generation_options(arguments: argparse.Namespace) -> GenerationOptions:
    """Returns the generation options that were given."""
    options: GenerationOptions = _given(arguments, GenerationOptions.__annotations__)
    if "fixed_action" in options:
        # It has no meaning in any other mode.
        options.setdefault("mode", Mode.FIXED)
    return options


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> Any:
    """Returns the arguments with these names, without those that were not given or that the command does not have."""
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def _read_token(path: Path) -> str:
    """Returns the file's only line. No message quotes the file."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TOKEN_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no file name"
        raise invalid_argument("--token-file", f"{path} cannot be read: {reason}") from None
    if len(content) > _MAX_TOKEN_BYTES:
        raise invalid_argument("--token-file", f"{path} holds more than a token")
    # The client checks the token's characters.
    token = content.decode("ascii", errors="replace").strip()
    if not token:
        raise invalid_argument("--token-file", f"{path} is empty")
    return token
