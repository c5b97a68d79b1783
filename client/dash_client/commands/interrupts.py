"""Handles Ctrl-C during a session at a terminal. Knows only the `cancel` of a stream."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, Self


class Cancellable(Protocol):
    """An answer that is still coming."""

    def cancel(self) -> None:
        """Ends it; safe from any thread."""


class Interrupts:
    """While entered, Ctrl-C ends the reading of a line or cancels an answer. In between it does nothing.

    Raising KeyboardInterrupt at any moment would be simpler, but could leave the client in a broken state.
    """

    def __init__(self) -> None:
        self.was_pressed = False
        """True if Ctrl-C cancelled the latest answer."""
        self._is_answering = False
        self._answer: Cancellable | None = None
        self._is_reading = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def while_reading(self, read: Callable[[], str]) -> str:
        """Calls `read`, and returns its result.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile.
        """
        self._is_reading = True
        try:
            return read()
        finally:
            self._is_reading = False

    @contextmanager
    def cancelling(self) -> Iterator[Callable[[Cancellable], None]]:
        """Makes Ctrl-C cancel an answer while in the block; yields the function that takes the answer.

        An earlier Ctrl-C cancels the answer as soon as the function gets it.
        """
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
                # In its own thread, since the interrupted one may hold locks that `cancel` needs.
                threading.Thread(target=self._answer.cancel, daemon=True).start()
