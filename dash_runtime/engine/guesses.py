"""Guesses: tokens that a lone sequence's pass runs beside its last one, because its output likely goes on with them.

A row of such a pass has the bits that it has alone, and each token is chosen from the row before it as ever. So the
output stays what it was: a right guess saves a pass, and a wrong one costs its row. A constraint says what it forces,
but the model may still split that into other tokens: jump-forward decoding (SGLang, Zheng et al. 2024) does not ask it.
Knows one sequence's tokens and costs; knows no passes.
"""

from collections.abc import Mapping, Sequence

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.engine.speculative import ForcedText
from dash_runtime.policy.draft_length import FORCED_MATCH, DraftLength

MOST_GUESSES = 7
"""Kernels take rows in groups of up to eight, and a head in INT4 is for up to ten."""
_NEVER = 1e9
"""The cost of a guess by the model, which makes none."""


class Guesses:
    """The guesses of one sequence.

    Args:
        costs: of a pass by its number of guesses, from 1 on, as multiples of one without (`pass_costs`).
    """

    def __init__(self, forced: ForcedText, costs: Mapping[int, float]) -> None:
        self._forced = forced
        self._costs = costs
        self._lengths = DraftLength(_NEVER, costs)

    def next(self, num_tokens_left: int) -> list[int]:
        """Returns the guesses of the next pass; none if they would not pay."""
        room = min(self._lengths.longest, num_tokens_left - 1)
        forced = self._forced.forced(room) if room > 0 else []
        if forced and self._lengths.pays([FORCED_MATCH] * len(forced)):
            return forced
        self.checked(0, 0)
        return []

    def cost(self, num_guesses: int) -> float:
        """Returns the cost of a pass with so many guesses, as a multiple of one without."""
        return self._costs[num_guesses]

    def checked(self, num_guesses: int, num_right: int) -> None:
        """Counts a pass with guesses, of which the first `num_right` were right."""
        self._lengths.verified([FORCED_MATCH] * num_guesses, num_right)


def pass_costs(latencies: LatencyTable, plan: Sequence[Action]) -> dict[int, float]:
    """Returns the cost of a pass by its number of guesses, as a multiple of one without; all rows run this plan."""

    def seconds(num_rows: int) -> float:
        return sum(latencies.cost(action, num_rows) for action in plan)

    alone = seconds(1)
    return {count: seconds(1 + count) / alone for count in range(1, MOST_GUESSES + 1)}
