"""What Ctrl-C does during a session at a terminal. Knows streams by their `cancel` only."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Protocol, Self


class Cancellable(Protocol):
    """An answer that is on its way."""

    def cancel(self) -> None:
        """Ends it; allowed from any thread."""


class Interrupts:
    """While entered, Ctrl-C ends the reading of a line, or cancels an answer, and does nothing in between.

    An exception at any moment would be simpler, and would leave a client that is to go on in whatever state it was.
    """

    def __init__(self) -> None:
        self.was_pressed = False
        """Whether the latest answer was cancelled by it."""
        self._is_answering = False
        self._answer: Cancellable | None = None
        self._is_reading = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def while_reading(self, read: Callable[[], str]) -> str:
        """What `read` returns.

        Raises:
            KeyboardInterrupt: it was interrupted.
        """
        self._is_reading = True
        try:
            return read()
        finally:
            self._is_reading = False

    @contextmanager
    def cancelling(self) -> Iterator[Callable[[Cancellable], None]]:
        """In the block, Ctrl-C cancels the answer that the function is told, also where it was asked for but is not
        there yet."""
        self.was_pressed = False
        self._is_answering = True
        try:
            yield self._set_answer
        finally:
            self._is_answering = False
            self._answer = None

    def _set_answer(self, answer: Cancellable) -> None:
        self._answer = answer
        if self.was_pressed:
            answer.cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_reading:
            self._is_reading = False
            raise KeyboardInterrupt
        if self._is_answering and not self.was_pressed:
            self.was_pressed = True
            if self._answer is not None:
                # The thread that is interrupted may hold the locks that this needs.
                threading.Thread(target=self._answer.cancel, daemon=True).start()
