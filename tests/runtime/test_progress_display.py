"""The progress display: a bar on a terminal, lines elsewhere, and never a reason for training to stop."""

import io
from collections.abc import Iterator
from itertools import count

import pytest

from dash_runtime.training.progress_display import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class BrokenTerminal(BrokenPipe):
    def isatty(self) -> bool:
        return True


def ticking(step: float) -> Iterator[float]:
    return (step * tick for tick in count())


def run(display: ProgressDisplay, start: int, end: int) -> None:
    for step in range(start, end):
        display.update(step + 1, f"{1000 * (step + 1):,} labels")


def test_without_a_terminal_there_is_one_line_every_ten_steps_and_at_the_end() -> None:
    stream = io.StringIO()
    times = ticking(155.0)
    with ProgressDisplay(34, stream=stream, clock=lambda: next(times)) as display:
        run(display, 0, 34)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "34"]
    assert lines[1] == "   20 of 34  20,000 labels  310 s"


def test_a_resumed_run_shows_the_steps_of_the_whole() -> None:
    stream = io.StringIO()
    with ProgressDisplay(300, 110, stream) as display:
        run(display, 110, 120)
    assert stream.getvalue().startswith("  120 of 300  ")


def test_a_terminal_gets_a_bar_with_the_figures_and_the_time_left() -> None:
    stream = Terminal()
    with ProgressDisplay(4, stream=stream) as display:
        run(display, 0, 3)
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert "3/4" in last
    assert "left, 3,000 labels" in last


def test_the_bar_of_a_resumed_run_begins_where_it_stopped() -> None:
    stream = Terminal()
    with ProgressDisplay(40, 20, stream) as display:
        run(display, 20, 30)
    text = stream.getvalue()
    assert "20/40" in text.split("\r")[1]
    assert "30/40" in text.split("\r")[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_bar_leaves_the_terminal_at_a_line_of_its_own(error: type[BaseException]) -> None:
    stream = Terminal()

    def train() -> None:
        with ProgressDisplay(4, stream=stream) as display:
            run(display, 0, 2)
            raise error

    with pytest.raises(error):
        train()
    assert stream.getvalue().endswith("\n")
    # Nothing hides the cursor or changes colours or modes, so nothing else must be restored.
    assert "\x1b[?" not in stream.getvalue()


def test_a_note_has_a_line_of_its_own() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with ProgressDisplay(4, stream=stream) as display:
            run(display, 0, 1)
            display.note("calibrating")
    assert plain.getvalue() == "calibrating\n"
    assert "calibrating\n" in terminal.getvalue().replace("\r", "\n").splitlines(keepends=True)


@pytest.mark.parametrize("stream", [BrokenPipe(), BrokenTerminal()])
def test_a_stream_that_takes_no_more_text_does_not_stop_training(stream: io.StringIO) -> None:
    with ProgressDisplay(20, stream=stream) as display:
        run(display, 0, 20)
        display.note("still here")
