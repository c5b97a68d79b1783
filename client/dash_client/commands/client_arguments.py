"""Turns command-line options into a client and the options of its calls. Knows no command."""

import argparse
from pathlib import Path
from typing import Any

from dash_client.client import DashClient
from dash_client.errors import invalid_argument
from dash_client.types import GenerationOptions, Mode

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
    given = {
        "target": arguments.target,
        "timeout": arguments.timeout,
        "tls": True if arguments.tls else None,
        "ca_file": arguments.ca_file,
        "certificate_file": arguments.certificate_file,
        "key_file": arguments.key_file,
        "server_name": arguments.server_name,
        "allow_insecure_token": True if arguments.allow_insecure_token else None,
        "token": None if arguments.token_file is None else _read_token(arguments.token_file),
    }
    return {name: value for name, value in given.items() if value is not None}


def generation_options(arguments: argparse.Namespace) -> GenerationOptions:
    """Returns the generation options that were given."""
    # `--fixed-action` has no meaning in any other mode.
    mode = arguments.mode or (Mode.FIXED if arguments.fixed_action else None)
    return GenerationOptions(
        mode=mode,
        compute_budget=arguments.budget,
        policy_name=arguments.policy,
        fixed_action=arguments.fixed_action,
        draft_length=arguments.draft_length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        ignore_eos=True if arguments.ignore_eos else None,
    )


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
