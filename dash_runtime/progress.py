"""How long work tells a person what it is doing. Imports nothing of ours."""

from collections.abc import Callable

Progress = Callable[[str], None]
"""Takes one sentence, without a line break or a full stop."""
