"""How many prompt rows a pass may have, so that neither those who decode nor the prompt wait long for each other.

Knows seconds and rows; knows no sequences.
"""

from collections.abc import Hashable

_MOST_SECONDS = 4.0
"""Of a pass while nobody decodes: a worker shows between passes that it works, and looks at new requests."""
_MOST_STEPS = 2.0
"""What a pass may take of the steps of those who decode: then a token comes after up to three times the usual time."""
_MOST_GROWTH = 4
_NEWEST = 0.3
"""The weight of the newest step in the mean."""


class PromptPace:
    """Watches the passes and steps of one engine.

    Args:
        fewest, most: bounds of a pass's rows.
    """

    def __init__(self, fewest: int, most: int) -> None:
        self._fewest, self._most = fewest, most
        self._seconds_of_row: dict[Hashable, float] = {}
        """By kind of pass, the seconds of the last one, by row."""
        self._step_seconds: float | None = None

    def num_rows(self, kind: Hashable, is_decoding: bool) -> int:
        """Returns the rows of the next pass of this kind. The first one has the fewest."""
        seconds_of_row = self._seconds_of_row.get(kind)
        if seconds_of_row is None:
            return self._fewest
        seconds = _MOST_SECONDS
        if is_decoding and self._step_seconds is not None:
            seconds = min(seconds, _MOST_STEPS * self._step_seconds)
        return max(self._fewest, min(self._most, int(seconds / seconds_of_row)))

    def passed(self, kind: Hashable, num_rows: int, seconds: float) -> None:
        """Takes what a pass took."""
        own = seconds / num_rows
        before = self._seconds_of_row.get(kind)
        # A short pass takes more by row than a long one would: the next ones find how long one may be.
        self._seconds_of_row[kind] = own if before is None else max(own, before / _MOST_GROWTH)

    def stepped(self, seconds: float) -> None:
        """Takes the time of a step of those who decode."""
        before = self._step_seconds
        self._step_seconds = seconds if before is None else before + _NEWEST * (seconds - before)
