"""`dash-client completion`: prints a shell completion script, which `shtab` makes from the parser."""

import argparse
from pathlib import Path

from dash_client.commands.arguments import parser
from dash_client.commands.exit_codes import ExitCode
from dash_client.commands.extras import missing_extra


def run(arguments: argparse.Namespace) -> ExitCode:
    """Runs the command."""
    try:
        import shtab
    except ImportError:
        raise missing_extra("completion", "shtab") from None

    root = parser()
    _complete_files(root, shtab.FILE)
    print(shtab.complete(root, arguments.shell))
    return ExitCode.OK


def _complete_files(command: argparse.ArgumentParser, completer: object) -> None:
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                _complete_files(action.choices[name], completer)
        elif action.type is Path:
            # shtab reads this attribute.
            action.complete = completer  # type: ignore[attr-defined]
