"""A burst: the tokens that a lone row is to decode in one call of native code, and what each one's pass left.

Knows memory; runs nothing.
"""

from array import array
from collections.abc import Collection, Sequence
from ctypes import c_int64
from dataclasses import dataclass
from typing import NamedTuple

from dash_runtime.rows.draws import Draw
from dash_runtime.rows.structs import MOST_GUESSES, BurstStruct, GuessesStruct


class WantedGuesses(NamedTuple):
    """The guesses of a burst (`engine.guesses`): the text so far, as the address of int32 with room for
    what follows, and its number of tokens; how many may follow; and how many are guessed, by the number of the last
    tokens that the text had before, from 0 to `LONGEST_MATCH`."""

    text: int
    num_tokens: int
    num_left: int
    numbers: Sequence[int]


@dataclass(frozen=True, slots=True)
class WantedBurst:
    """A burst to decode: up to `count` tokens of a lone row, each the likeliest after the one before, or drawn. The
    first follows `token_id`, and none follows one of `end_ids`, or begins once somebody has written to `wake_file`.
    With guesses the last pass may put out more."""

    token_id: int
    count: int
    end_ids: Collection[int]
    draws: Sequence[Draw] = ()
    """Each token's, and those of what the last pass may put out; none if none is drawn."""
    wake_file: int = -1
    """A file descriptor; negative for none."""
    guesses: WantedGuesses | None = None
    """The burst's tokens are added to its text."""

    @property
    def most(self) -> int:
        """The most tokens that it may put out."""
        return self.count if self.guesses is None else self.count + MOST_GUESSES


class Burst:
    """The memory of up to `count` tokens, which the native code fills in.

    Args:
        num_score_bytes: the size of the scores with which a pass decides its layers; 0 if it decides nothing.
    """

    def __init__(self, count: int, num_layers: int, num_score_bytes: int) -> None:
        self._num_layers, self._num_score_bytes = num_layers, num_score_bytes
        self._tokens, self._plans = array("q", bytes(8 * count)), array("B", bytes(count * num_layers))
        self._times, self._marks = array("q", bytes(16 * count * num_layers)), array("q", bytes(16 * count))
        self._rows = array("q", bytes(8 * count))
        self._scores = array("B", bytes(count * num_score_bytes))
        memory = self._tokens, self._plans, self._times, self._scores, self._marks, self._rows
        self.struct = BurstStruct(*(own.buffer_info()[0] for own in memory))
        self.num_tokens = 0
        """The number of tokens that there are."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens, in order."""
        return self._tokens[: self.num_tokens].tolist()

    @property
    def num_positions(self) -> int:
        """The number of positions that were written, those of wrong guesses too."""
        return max(place + rows for place, rows in enumerate(self._rows[: self.num_tokens]))

    @property
    def plans(self) -> list[bytes]:
        """The actions that ran, by token, a byte per layer."""
        size, ran = self._num_layers, self._plans.tobytes()
        return [ran[place * size : (place + 1) * size] for place in range(self.num_tokens)]

    @property
    def num_rows(self) -> list[int]:
        """The rows of its pass at each pass's first token, and 0 at its others."""
        return self._rows[: self.num_tokens].tolist()

    @property
    def num_plain(self) -> int:
        """The number of passes without guesses."""
        return self._rows[: self.num_tokens].count(1)

    @property
    def plain_seconds(self) -> float:
        """The seconds that these passes took."""
        places = (place for place, rows in enumerate(self._rows[: self.num_tokens]) if rows == 1)
        return sum(self._marks[2 * place + 1] - self._marks[2 * place] for place in places) / 1e9

    def layer_times(self, place: int) -> array:
        """Returns each layer's start and end in a token's pass, by `perf_counter_ns`."""
        size = 2 * self._num_layers
        return self._times[place * size : (place + 1) * size]

    def scores(self, place: int) -> bytes | None:
        """Returns the scores with which a token's pass decided its layers (`RowDecisions.scores`); None if it decided
        none."""
        size = self._num_score_bytes
        decided = size and self._rows[place] == 1
        return self._scores[place * size : (place + 1) * size].tobytes() if decided else None

    def times(self, place: int) -> tuple[int, int]:
        """Returns when a token's pass began, and when the token was chosen, by `perf_counter_ns`."""
        return self._marks[2 * place], self._marks[2 * place + 1]


def guesses_struct(wanted: WantedGuesses) -> GuessesStruct:
    """Returns what the native code is told of guesses."""
    text, num_tokens, num_left, numbers = wanted
    return GuessesStruct(text, num_tokens, num_left, (c_int64 * len(numbers))(*numbers))
