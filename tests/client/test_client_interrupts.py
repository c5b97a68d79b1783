"""A Ctrl-C at any moment is neither lost nor ends the session."""

import signal
import threading

import pytest

from dash_client.commands.interrupts import Interrupts


class Answer:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.mark.parametrize("is_there", [True, False])
def test_an_answer_is_cancelled_whether_it_is_there_yet_or_only_asked_for(is_there: bool) -> None:
    answer, interrupts = Answer(), Interrupts()
    with interrupts, interrupts.cancelling() as set_answer:
        if is_there:
            set_answer(answer)
        signal.raise_signal(signal.SIGINT)
        if not is_there:
            set_answer(answer)
        assert answer.cancelled.wait(30)
        assert interrupts.was_pressed


def test_in_between_it_does_nothing_and_the_next_answer_is_not_cancelled() -> None:
    answer, interrupts = Answer(), Interrupts()
    with interrupts:
        with interrupts.cancelling():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with interrupts.cancelling() as set_answer:
            set_answer(answer)
            assert not interrupts.was_pressed
    assert not answer.cancelled.is_set()


def test_the_reading_of_a_line_ends_and_the_handler_is_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.while_reading(lambda: signal.raise_signal(signal.SIGINT) or "")
    assert signal.getsignal(signal.SIGINT) is before
