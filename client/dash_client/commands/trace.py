"""`dash-client trace`: fetches or reads a request's recorded decisions, and writes them as a page."""

import argparse
import os
import re
from pathlib import Path

from dash_client.client import DashClient
from dash_client.commands.client_arguments import connect
from dash_client.commands.exit_codes import ExitCode
from dash_client.commands.output import print_json
from dash_client.decision_trace import RecordedDecisions
from dash_client.trace.decision_trace_files import load_decisions, save_decisions, write_text
from dash_client.trace.trace_page import trace_page


def run(arguments: argparse.Namespace) -> ExitCode:
    """Runs the command."""
    with connect(arguments) as client:
        decisions = _decisions(client, arguments.source)
    if arguments.save is not None:
        save_decisions(decisions, arguments.save)
    page = arguments.output or _default_page(decisions)
    write_text(page, trace_page(decisions))
    if arguments.json:
        print_json({"page": str(page), "saved": None if arguments.save is None else str(arguments.save)})
    else:
        print(page)
    return ExitCode.OK


def _decisions(client: DashClient, source: str) -> RecordedDecisions:
    """Reads the file `source`, or asks the server for the request of that id."""
    path = Path(source)
    # A request id has neither a separator nor a suffix; a mistyped file name should not be sent to a server.
    is_file = os.path.exists(path) or len(path.parts) > 1 or path.suffix != ""
    return load_decisions(path) if is_file else client.decisions(source)


def _default_page(decisions: RecordedDecisions) -> Path:
    """Returns a valid file name in the working folder, whatever the request id is."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", decisions.request_id)[:80]
    return Path(f"trace-{name}.html")
