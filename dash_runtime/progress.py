"""The one type through which long work reports what it is doing. Imports nothing of ours."""

from collections.abc import Callable

Progress = Callable[[str], None]
"""Takes one sentence, without a line break or a full stop."""
