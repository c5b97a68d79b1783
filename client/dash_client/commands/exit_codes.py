"""The exit codes of the process, and the errors that they stand for. Knows no command."""

from enum import IntEnum

from dash_client.errors import DashError, InvalidArgumentError, UnauthenticatedError, UnavailableError


class ExitCode(IntEnum):
    """The exit codes; `EXPLANATION` explains them."""

    OK = 0
    SERVER_ERROR = 1
    USAGE = 2
    UNAVAILABLE = 3
    UNAUTHENTICATED = 4
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141


EXPLANATION = """\
exit codes:
  0    ok
  1    the server reported an error, or the timeout passed
  2    wrong usage, an argument that the server refuses, or a package that is not installed
  3    no server at the target, or it is not serving
  4    the server asks for a token, or refuses this one
  130  interrupted (Ctrl-C); the request is cancelled on the server
  141  whoever read the output went away; the request is cancelled on the server
"""


def exit_code_of(error: DashError) -> ExitCode:
    """Returns the exit code for this error."""
    if isinstance(error, InvalidArgumentError):
        return ExitCode.USAGE
    if isinstance(error, UnavailableError):
        return ExitCode.UNAVAILABLE
    if isinstance(error, UnauthenticatedError):
        return ExitCode.UNAUTHENTICATED
    return ExitCode.SERVER_ERROR
