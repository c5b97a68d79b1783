"""Chooses the number of threads of native code: all of them, or one while a neighbour wants their processors.

Threads that wait for each other are as slow as the slowest. Beside a process that wants a processor all the time, two
threads on two processors give half of what one alone does. A row's bits do not depend on the number of threads, so it
may change between calls. Knows times; knows no work.
"""

from collections import deque
from collections.abc import Hashable
from statistics import median

_SLOW = 1.6
"""Times as long as the fastest calls of the same work: something disturbs them."""
_TRIAL = 6
"""Calls that tell how fast a number of threads is."""
_REST = 150
"""Calls from one trial to the next at least."""
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
        self._num_calls_left = 0
        """Calls of a trial that are left, or until there may be one."""
        self._is_trial = False

    def took(self, work: Hashable, seconds: float) -> None:
        """Takes in the time of a call; `work` names what it did, so that it compares with others of that name."""
        if self._most == 1:
            return
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
        latest.append(ratio)
        self._num_calls_left -= 1
        if self._num_calls_left > 0 or len(latest) < _TRIAL:
            return
        if self._is_trial:
            self._end_trial()
        elif self.current == 1 or (ratio > _SLOW and median(latest) > _SLOW):
            self._begin_trial()

    def _begin_trial(self) -> None:
        self.current = 1 if self.current == self._most else self._most
        self._latest[self.current].clear()
        self._is_trial, self._num_calls_left = True, _TRIAL

    def _end_trial(self) -> None:
        self.current = min(self._latest, key=lambda count: median(self._latest[count]))
        self._is_trial, self._num_calls_left = False, _REST
