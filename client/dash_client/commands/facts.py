"""`dash-client info`, `audit`, `health` and `tokenize`: print facts about a server, its model and a prompt."""

import argparse
import sys
from typing import Any

from dash_client.client import DashClient
from dash_client.commands.client_arguments import connect
from dash_client.commands.exit_codes import ExitCode
from dash_client.commands.output import as_json, print_json, printable
from dash_client.commands.prompts import prompt_of
from dash_client.errors import DashError
from dash_client.types import HealthStatus

_REASON_SECONDS = 1.0


def run_info(arguments: argparse.Namespace) -> ExitCode:
    """Prints the model, its limits, and a policy."""
    with connect(arguments) as client:
        facts = {"model": as_json(client.model_info()), "policy": as_json(client.policy_info(arguments.policy))}
    if arguments.json:
        print_json(facts)
        return ExitCode.OK
    for title, section in facts.items():
        print(title)
        for name, value in section.items():
            print(printable(f"  {name:<26}{_in_words(value)}", sys.stdout))
    return ExitCode.OK


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item:.3f}" for key, item in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def run_audit(arguments: argparse.Namespace) -> ExitCode:
    """Prints how an answer compares with full depth."""
    with connect(arguments) as client:
        facts = as_json(client.audit(arguments.request_id))
    if arguments.json:
        print_json(facts)
        return ExitCode.OK
    for name, value in facts.items():
        words = "unknown" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        print(printable(f"{name:<26}{words}", sys.stdout))
    return ExitCode.OK


def run_health(arguments: argparse.Namespace) -> ExitCode:
    """Prints the server's state."""
    arguments.retries = 0  # who probes wants to know how it is now
    with connect(arguments) as client:
        if arguments.wait is not None:
            client.wait_until_ready(arguments.wait)
        status = client.health()
        reason = None if status is HealthStatus.SERVING else _why_not_serving(client)
        if arguments.json:
            print_json({"target": client.target, "status": status.name, **({"reason": reason} if reason else {})})
        else:
            print(printable(status.name if reason is None else f"{status.name}: {reason}", sys.stdout))
    return ExitCode.OK if status is HealthStatus.SERVING else ExitCode.UNAVAILABLE


def _why_not_serving(client: DashClient) -> str | None:
    """Returns what the server says of itself: while it starts, what it is doing."""
    try:
        client.model_info(timeout=_REASON_SECONDS)
    except DashError as error:
        return error.message
    return None


def run_tokenize(arguments: argparse.Namespace) -> ExitCode:
    """Prints the token ids of a prompt."""
    with connect(arguments) as client:
        token_ids = client.tokenize(prompt_of(arguments))
    if arguments.json:
        print_json({"token_ids": token_ids})
    else:
        print(*token_ids)
    return ExitCode.OK
