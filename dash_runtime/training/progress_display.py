"""Shows a person the progress of training: a bar on a terminal, occasional lines elsewhere.

Knows the figures and the terminal; knows no training and no files.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

_LINE_EVERY = 10


class ProgressDisplay:
    """Shows how far training is; a context manager. One batch of labels is one step of `total`.

    On a terminal with tqdm installed it is a bar with the time left, elsewhere a line every ten steps and at the
    last. A stream that fails ends the display, never the training.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A resumed run has done `start` steps. `stream` is stderr by default, `clock` counts seconds."""
        self._total = total
        self._start = start
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._bar: Any = None
        self._broken = False

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._stream.isatty():
            self._show(self._open_bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after Ctrl-C: closing completes the bar's line, and later text begins on its own.
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None

    def update(self, done: int, text: str) -> None:
        """Shows that `done` steps of the total are done, and a few figures."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._show(lambda: self._bar.update(done - self._bar.n))
        elif done % _LINE_EVERY == 0 or done == self._total:
            seconds = self._clock() - self._started
            self._show(lambda: self._write(f"{done:5} of {self._total}  {text}  {seconds:.0f} s"))

    def note(self, text: str) -> None:
        """Writes a line, above the bar if there is one."""
        if self._bar is None:
            self._show(lambda: self._write(text))
        else:
            self._show(lambda: self._bar.write(text, file=self._stream))

    def _open_bar(self) -> None:
        self._bar = _bar(self._total, self._start, self._stream)

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _show(self, draw: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            draw()
        except OSError:
            self._broken = True


def _bar(total: int, start: int, stream: TextIO) -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm(
        total=total,
        initial=start,
        file=stream,
        dynamic_ncols=True,
        # A step takes seconds: redraw after each.
        miniters=1,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}",
    )
