"""Guesses: tokens that a pass runs beside a sequence's last one, because its output likely goes on with them.

A row of such a pass has the bits that it has alone, and each token is chosen from the row before it as ever. So the
output of a plan stays what it was: a right guess saves a pass, and a wrong one costs its row. A constraint says what it
forces. The model may still split that into other tokens, and is asked, as it is not by jump-forward decoding (SGLang,
Zheng et al. 2024). Knows tokens, counts and seconds; knows no sequences and no passes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.engine.speculative import ForcedText
from dash_runtime.policy.draft_length import FORCED_MATCH, DraftLength

MOST_GUESSES = 7
"""The most guesses of a sequence: kernels take rows in groups of up to eight, and a head in INT4 is for up to ten."""
_LEAST_GAIN, _GAIN_BY_SEQUENCE = 1.03, 0.02
"""Expected gain below which nothing is guessed, and what each sequence adds to that. It pays for what the seconds leave
out: new rows are made ready, and each token is chosen by itself."""


class PassSeconds:
    """The seconds that the layers of a pass take whose rows all run one plan."""

    def __init__(self, latencies: LatencyTable, plan: Iterable[Action]) -> None:
        self._latencies = latencies
        self._counts = Counter(plan)

    def of(self, num_rows: int) -> float:
        return sum(count * self._latencies.cost(action, num_rows) for action, count in self._counts.items())

    def least_pace(self, num_sequences: int) -> float:
        """Returns the tokens a second from which on guesses of so many sequences pay."""
        return (_LEAST_GAIN + _GAIN_BY_SEQUENCE * num_sequences) * num_sequences / self.of(num_sequences)

    def may_pay(self, num_sequences: int) -> bool:
        """Returns False if guesses of so many sequences would not even pay if all were right. To ask the constraints of
        sixteen takes a twentieth of a step."""
        most = num_sequences * (1 + MOST_GUESSES)
        return most / self.of(most) > self.least_pace(num_sequences)


class Guesses:
    """The guesses of one sequence."""

    def __init__(self, forced: ForcedText, seconds: PassSeconds) -> None:
        self.seconds = seconds
        self._forced = forced
        self._lengths = DraftLength(0.0, {})

    def wanted(self, num_tokens_left: int) -> list[int]:
        """Returns what the next pass may run. It puts out one token more."""
        room = min(MOST_GUESSES, num_tokens_left - 1)
        return self._forced.forced(room) if room > 0 else []

    def expected(self, num_guesses: int) -> float:
        """Returns how many of so many guesses are expected to be right."""
        return self._lengths.expected([FORCED_MATCH] * num_guesses) - 1

    def cost(self, num_guesses: int) -> float:
        """Returns the cost of a pass of this sequence alone with so many guesses, as a multiple of one without."""
        return self.seconds.of(1 + num_guesses) / self.seconds.of(1)

    def checked(self, num_guesses: int, num_right: int) -> None:
        """Counts a pass with guesses, of which the first `num_right` were right; or one without."""
        self._lengths.verified([FORCED_MATCH] * num_guesses, num_right)


def places_that_pay(wanted: Mapping[int, tuple[Guesses, Sequence[int]]], num_sequences: int) -> set[int]:
    """Returns the places of the guesses with which a pass over a row of each of so many sequences, all of one plan,
    puts out most in its time; none if that is hardly more than without any."""
    if not wanted:
        return set()
    seconds = next(iter(wanted.values()))[0].seconds
    expected = {place: own.expected(len(tokens)) for place, (own, tokens) in wanted.items()}
    order = sorted(wanted, key=lambda place: -expected[place] / len(wanted[place][1]))
    output, num_rows = float(num_sequences), num_sequences
    best, best_pace = 0, seconds.least_pace(num_sequences)
    for count, place in enumerate(order, start=1):
        output, num_rows = output + expected[place], num_rows + len(wanted[place][1])
        if (pace := output / seconds.of(num_rows)) > best_pace:
            best, best_pace = count, pace
    return set(order[:best])
