"""What an engine still measures once it serves: one piece after another, while nobody asks for anything.

Knows pieces of work; knows not what they do.
"""

from collections import deque
from collections.abc import Callable

Piece = Callable[[], None]


class LaterWork:
    """Pieces of work, in order. A piece runs passes of its own, and calls `pause` before each of them, in which whoever
    waits is served first. An engine that is never idle never comes to them."""

    def __init__(self) -> None:
        self.serve_others: Callable[[], None] = lambda: None
        self._pieces: deque[Piece] = deque()

    def add(self, piece: Piece) -> None:
        """Adds a piece of work at the end."""
        self._pieces.append(piece)

    @property
    def is_done(self) -> bool:
        """True if nothing is left."""
        return not self._pieces

    def pause(self) -> None:
        """Lets others go first."""
        self.serve_others()

    def work(self) -> None:
        """Does the next piece. One that fails is not tried again."""
        self._pieces.popleft()()

    def finish(self) -> None:
        """Does all that is left."""
        while not self.is_done:
            self.work()
