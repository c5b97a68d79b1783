"""What a lone row's passes leave, up to a limit; and what native code is told of draws and guesses.

Knows memory; runs nothing.
"""

from array import array
from collections.abc import Iterable
from ctypes import Array, addressof, c_int32, c_int64, memmove

from dash_runtime.native.structs import BurstStruct, DrawStruct, GuessesStruct
from dash_runtime.passes import Draw, PassResult, TextGuesses


class BurstRecord:
    """The memory of up to `count` tokens, which the native code fills in; a `PassRecord`, by token.

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

    def result(self) -> PassResult:
        """Returns all of it. Positions were written for wrong guesses, too."""
        count, size, ran = self.num_tokens, self._num_layers, self._plans.tobytes()
        plans = [ran[first : first + size] for first in range(0, count * size, size)]
        num_rows = self._rows[:count].tolist()
        num_positions = max(place + rows for place, rows in enumerate(num_rows))
        return PassResult(self._tokens[:count].tolist(), plans, self, num_rows=num_rows, num_positions=num_positions)

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
        size = 2 * self._num_layers
        return self._times[place * size : (place + 1) * size]

    def scores(self, place: int) -> bytes | None:
        size = self._num_score_bytes
        decided = size and self._rows[place] == 1
        return self._scores[place * size : (place + 1) * size].tobytes() if decided else None

    def times(self, place: int) -> tuple[int, int]:
        return self._marks[2 * place], self._marks[2 * place + 1]


def draw_structs(draws: Iterable[Draw]) -> "Array[DrawStruct]":
    """Returns draws for the native code."""
    own = [DrawStruct(*draw) for draw in draws]
    return (DrawStruct * len(own))(*own)


def guesses_struct(wanted: TextGuesses, most: int) -> tuple[GuessesStruct, object]:
    """Returns what the native code is told of guesses, and the owner of its memory: a copy of the text, to which it
    adds up to `most` tokens."""
    count, numbers = len(wanted.text), wanted.numbers
    text = (c_int32 * (count + most))()
    memmove(text, wanted.text.ctypes.data, 4 * count)
    return GuessesStruct(addressof(text), count, wanted.num_left, (c_int64 * len(numbers))(*numbers)), text
