"""The exit codes of `dash-server`, and how it tells why it ends. Imports nothing."""

import sys

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2


def complain(*lines: str, code: int = EXIT_USER_ERROR) -> int:
    """Writes the lines for whoever started the server, and returns the exit code."""
    for line in lines:
        print(f"dash-server: {line}", file=sys.stderr)
    return code
