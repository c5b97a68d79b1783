"""How long work reports what it is doing. Imports nothing of ours."""

import time
from collections.abc import Callable, Iterator

Progress = Callable[[str], None]
"""Takes one sentence, without a line break or a full stop."""
_SECONDS_UNTOLD = 2.0


def told(done: Iterator[int], total: int, what: str, progress: Progress) -> Iterator[int]:
    """Yields how much of `total` is done, and tells `what` is done and, every few seconds, how long the rest will
    take."""
    started = said_at = time.monotonic()
    progress(what)
    for count in done:
        yield count
        now = time.monotonic()
        if now - said_at >= _SECONDS_UNTOLD:
            said_at, left = now, (now - started) * (total - count) / count
            progress(f"{what}: {count / total:.0%}, about {left:.0f} s left")
