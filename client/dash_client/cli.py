"""The `dash-client` command: runs a command by name, and turns its end into an exit code.

Knows no command itself; see `dash_client.commands`.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from dash_client.commands.arguments import parser
from dash_client.commands.exit_codes import ExitCode, exit_code_of
from dash_client.commands.output import report_error
from dash_client.errors import DashError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code (argparse itself exits by `SystemExit`)."""
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            code: ExitCode = arguments.load()(arguments)
        except DashError as error:
            report_error(error, json=arguments.json)
            code = exit_code_of(error)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        # If the output is a closed pipe as well, the interrupt still decides the exit code.
        with contextlib.suppress(BrokenPipeError):
            print("\ncancelled", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OUTPUT_CLOSED


if __name__ == "__main__":
    sys.exit(main())
