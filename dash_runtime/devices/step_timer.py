"""When the layers of a step began and ended, by the host's clock or by a CUDA device's.

A host that only queues work knows when it queued it, and not when it ran. Knows places of marks; knows no layers.
"""

import time
from array import array
from typing import Any

import torch

_NS_PER_MS = 1e6


def no_times(num_marks: int) -> array:
    """Returns room for the times of so many marks."""
    return array("q", bytes(8 * num_marks))


class StepTimer:
    """Takes the host's time at each mark."""

    def __init__(self, times: array) -> None:
        """`times` has the marks that were taken elsewhere, or zeros."""
        self._times = times

    def mark(self, place: int) -> None:
        """Takes the time of the work that is queued so far."""
        self._times[place] = time.perf_counter_ns()

    def times(self) -> array:
        """Returns the time of each mark by `perf_counter_ns`. To be called once all work is done."""
        return self._times


class CudaStepTimer(StepTimer):
    """Takes the device's time at each mark, by events that are read after the step. Has not been run on a GPU.

    Args:
        cuda: `torch.cuda`, or anything with its `Event` and `current_stream`.
    """

    def __init__(self, num_marks: int, device: torch.device, cuda: Any) -> None:
        super().__init__(no_times(num_marks))
        self._cuda = cuda
        self._device = device
        self._anchor, *self._events = [cuda.Event(enable_timing=True) for _ in range(1 + num_marks)]
        self._is_read = True

    def start(self) -> None:
        """Begins a step. The device should be idle: its clock is set to the host's here."""
        self._is_read = False
        self._started_ns = time.perf_counter_ns()
        self._anchor.record(self._cuda.current_stream(self._device))

    def mark(self, place: int) -> None:
        self._events[place].record(self._cuda.current_stream(self._device))

    def times(self) -> array:
        if not self._is_read:
            self._is_read = True
            self._times = array("q", map(self.time_of, self._events))
        return self._times

    def time_of(self, event: Any) -> int:
        """Returns when the device came to an event, by `perf_counter_ns`."""
        return self._started_ns + int(self._anchor.elapsed_time(event) * _NS_PER_MS)
