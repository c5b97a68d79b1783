"""Chooses the number of threads of native code: all of them, or one while a neighbour wants their processors.

Threads that wait for each other are as slow as the slowest. Beside a process that wants a processor all the time, two
threads on two processors give half of what one alone does. A row's bits do not depend on the number of threads, so it
may change between calls. Knows times; knows no work.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from statistics import median

_SLOW = 1.6
"""Times as long as the fastest calls of the same work: something disturbs them."""
_TRIAL = 6
"""Passes that tell how fast a number of threads is."""
_CLEARLY = 0.9
"""One thread takes at most this share of the time of all, or all remain."""
_FIRST_REST, _LAST_REST = 20, 160
"""Passes between two trials at least. Doubled while the same number wins, so that a wrong choice ends soon."""
_UNSEEN = 3
"""Calls after a quick one of all threads, of a single pass, that are not timed: to keep a time takes a tenth of what
Python does for a token."""
_MOST_KINDS = 256
_FADING = 1.001
"""The fastest time grows by this from call to call, since the machine's memory may have become slower."""


class ThreadCount:
    """The number of threads of the next call."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.current = most
        self._fastest: dict[Hashable, float] = {}
        self._latest: dict[int, deque[float]] = {most: deque(maxlen=_TRIAL), 1: deque(maxlen=_TRIAL)}
        """By number of threads: the latest times, over the fastest of the same work with all threads."""
        self._num_passes_left = 0
        """Passes of a trial that are left, or until there may be one."""
        self._to_try: list[int] = []
        """The numbers of threads that a trial has yet to time, the one being timed first."""
        self._chosen, self._rest = most, _FIRST_REST
        self._num_unseen = 0

    def is_seen(self) -> bool:
        """Returns True if the next call is to be timed."""
        self._num_unseen -= 1
        return self._num_unseen < 0 and self._most > 1

    @property
    def is_trying(self) -> bool:
        """True if the next call is part of a trial. It should be short, since it may take several times as long."""
        return bool(self._to_try)

    def took(self, work: Hashable, seconds: float, num_passes: int = 1) -> None:
        """Takes in the time of each pass of a call that was seen. `work` names what one does: times of one name are
        compared."""
        fastest = self._fastest.get(work)
        if fastest is None and self.current != self._most:
            return
        if len(self._fastest) >= _MOST_KINDS:
            self._fastest.clear()
        fastest = seconds if fastest is None else fastest * _FADING
        if self.current == self._most:
            self._fastest[work] = fastest = min(fastest, seconds)
        latest = self._latest[self.current]
        ratio = seconds / fastest
        is_quick = self.current == self._most and not self._to_try and ratio < _SLOW
        self._num_unseen = _UNSEEN if is_quick and num_passes == 1 else 0
        latest.extend([ratio] * min(num_passes, _TRIAL))
        self._num_passes_left -= num_passes
        if self._is_hopeless(latest):
            self._num_passes_left = 0
        elif self._num_passes_left > 0 or len(latest) < _TRIAL:
            return
        if self._to_try:
            self._to_try.pop(0)
            if not self._to_try:
                self._choose()
        elif self.current == 1:
            self._to_try = [self._most]
        elif ratio > _SLOW and median(latest) > _SLOW:
            # All threads again after one: their latest calls were picked for being slow.
            self._to_try = [1, self._most]
        if self._to_try:
            self.current = self._to_try[0]
            self._latest[self.current].clear()
            self._num_passes_left = _TRIAL

    def _is_hopeless(self, latest: Sequence[float]) -> bool:
        """Returns True if the first pass of all threads took longer than one thread does: beside a busy process it
        takes several times as long. Where that was chance, the next trial tells."""
        is_trial = bool(self._to_try) and self.current == self._most
        return is_trial and len(latest) == 1 and latest[0] > median(self._latest[1])

    def _choose(self) -> None:
        before = self._chosen
        alone, together = median(self._latest[1]), median(self._latest[self._most])
        self.current = self._chosen = 1 if alone < _CLEARLY * together else self._most
        self._rest = min(2 * self._rest, _LAST_REST) if self._chosen == before else _FIRST_REST
        self._num_passes_left = self._rest
