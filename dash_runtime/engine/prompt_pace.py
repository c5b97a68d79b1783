"""Decides how much of a prompt's pass runs at a time, so that it and those who decode wait little for each other.

Knows seconds, rows and layers; knows no sequences.
"""

from collections.abc import Hashable

_MOST_STEPS = 1.5
"""The time that a part of a pass may take, in steps of those who decode: then a token comes after two to four times the
usual time."""
_LEAST_ROWS = 64
"""Fewer rows take about as long: the weights have to be read."""
_NEWEST = 0.3
"""The weight of the newest step in the mean."""


class PromptPace:
    """Watches the passes and steps of one engine.

    Args:
        fewest, most: bounds of a pass's rows.
    """

    def __init__(self, fewest: int, most: int) -> None:
        self._fewest, self._most = fewest, most
        self._seconds: dict[Hashable, float] = {}
        """By kind of pass, the seconds of a layer by row, as it was last, of passes with at least `_LEAST_ROWS`."""
        self._step_seconds: float | None = None

    def num_rows(self, kind: Hashable, is_decoding: bool) -> int:
        """Returns the rows of the next pass of this kind: as many as there may be, or beside those who decode as many
        as a part of one layer can have."""
        if not is_decoding or self._step_seconds is None:
            return self._most
        own = self._seconds.get(kind)
        if own is None:
            return self._fewest
        return max(self._fewest, min(self._most, int(_MOST_STEPS * self._step_seconds / own)))

    def num_layers(self, kind: Hashable, num_rows: int) -> int:
        """Returns the layers of such a pass that may run before others have their next step."""
        own = self.seconds(kind, num_rows, num_layers=1)
        if own is None or self._step_seconds is None:
            return 1
        return max(1, int(_MOST_STEPS * self._step_seconds / own))

    def seconds(self, kind: Hashable, num_rows: int, num_layers: int) -> float | None:
        """Returns what so many layers take, as far as it is known."""
        own = self._seconds.get(kind)
        return None if own is None else own * max(num_rows, _LEAST_ROWS) * num_layers

    def passed(self, kind: Hashable, num_rows: int, num_layers: int, seconds: float) -> None:
        """Takes what so many layers took."""
        self._seconds[kind] = seconds / (max(num_rows, _LEAST_ROWS) * num_layers)

    def stepped(self, seconds: float) -> None:
        """Takes the time of a step of those who decode."""
        before = self._step_seconds
        self._step_seconds = seconds if before is None else before + _NEWEST * (seconds - before)
