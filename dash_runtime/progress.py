"""The function that slow work tells what it is doing, one sentence at a time."""

from collections.abc import Callable

Progress = Callable[[str], None]
"""Takes one sentence, without a line break or a full stop."""
