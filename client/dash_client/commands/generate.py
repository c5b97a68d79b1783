"""`dash-client generate`: one answer, streamed as text or printed as JSON."""

import argparse

from dash_client.commands.answer_printer import AnswerPrinter, say_note, summary
from dash_client.commands.client_arguments import connect, generation_options
from dash_client.commands.exit_codes import ExitCode
from dash_client.commands.output import print_json, say
from dash_client.commands.prompts import prompt_of


def run(arguments: argparse.Namespace) -> ExitCode:
    """Runs the command."""
    options = generation_options(arguments)
    options["return_decisions"] = True if arguments.show_depth else None
    with connect(arguments) as client, client.stream(prompt_of(arguments), **options) as stream:
        if arguments.json:
            print_json(stream.final())
            return ExitCode.OK
        if not arguments.quiet:
            say_note(stream.started)
        AnswerPrinter(arguments, stream.started.layer_count).print(stream)
        if not arguments.quiet:
            say(summary(stream.final()))
    return ExitCode.OK
