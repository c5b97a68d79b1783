"""`dash-client trace`: a page of a request's decisions. What is on it comes from `trace_command`."""

import argparse

from dash_client.commands.connection import connect
from dash_client.commands.exit_codes import ExitCode
from dash_client.commands.output import print_json
from dash_client.trace_command import write_trace


def run(arguments: argparse.Namespace) -> ExitCode:
    """Runs the command."""
    with connect(arguments) as client:
        page = write_trace(client, arguments.source, page=arguments.output, save=arguments.save)
    if arguments.json:
        print_json({"page": str(page), "saved": None if arguments.save is None else str(arguments.save)})
    else:
        print(page)
    return ExitCode.OK
