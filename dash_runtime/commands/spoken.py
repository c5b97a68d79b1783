"""Tells a person what a command is doing: lines on standard error, at once, also where that is a file."""

import sys
import time

_started = time.monotonic()


def say(text: str) -> None:
    """Prints the seconds since the start of the command, and what it does now."""
    print(f"{time.monotonic() - _started:5.0f} s  {text}", file=sys.stderr, flush=True)
