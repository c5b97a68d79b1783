"""A burst: the tokens that a lone row decoded in one call of native code, and what each one's pass left.

Knows memory; runs nothing.
"""

from array import array

from dash_runtime.rows.structs import BurstStruct


class Burst:
    """The memory of up to `count` tokens, which the native code fills in.

    Args:
        num_score_bytes: the size of the scores with which a pass decides its layers; 0 if it decides nothing.
    """

    def __init__(self, count: int, num_layers: int, num_score_bytes: int) -> None:
        self._num_layers, self._num_score_bytes = num_layers, num_score_bytes
        self._tokens, self._plans = array("q", bytes(8 * count)), array("B", bytes(count * num_layers))
        self._times, self._marks = array("q", bytes(16 * count * num_layers)), array("q", bytes(16 * count))
        self._scores = array("B", bytes(count * num_score_bytes))
        memory = self._tokens, self._plans, self._times, self._scores, self._marks
        self.struct = BurstStruct(*(own.buffer_info()[0] for own in memory))
        self.num_tokens = 0
        """The number of tokens that there are."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens, in order."""
        return self._tokens[: self.num_tokens].tolist()

    @property
    def plans(self) -> list[bytes]:
        """The actions that ran, by token, a byte per layer."""
        size, ran = self._num_layers, self._plans.tobytes()
        return [ran[place * size : (place + 1) * size] for place in range(self.num_tokens)]

    def layer_times(self, place: int) -> array:
        """Returns each layer's start and end in a token's pass, by `perf_counter_ns`."""
        size = 2 * self._num_layers
        return self._times[place * size : (place + 1) * size]

    def scores(self, place: int) -> bytes | None:
        """Returns the scores with which a token's pass decided its layers (`RowDecisions.scores`); None if it decided
        none."""
        size = self._num_score_bytes
        return self._scores[place * size : (place + 1) * size].tobytes() if size else None

    def times(self, place: int) -> tuple[int, int]:
        """Returns when a token's pass began, and when the token was chosen, by `perf_counter_ns`."""
        return self._marks[2 * place], self._marks[2 * place + 1]
