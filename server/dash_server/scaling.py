"""Decides when a worker is added and when one is removed. Knows numbers and a clock; knows no workers."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

GROW_AFTER_SECONDS = 5.0
SHRINK_AFTER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class WorkerRange:
    """The least and the greatest number of workers."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "WorkerRange":
        """Reads `3` or `2-8`. Raises ValueError for anything else."""
        least, dash, most = text.partition("-")
        try:
            numbers = cls(int(least), int(most if dash else least))
        except ValueError:
            raise ValueError("must be a number, or a range such as 2-8") from None
        if not 1 <= numbers.least <= numbers.most <= 64:
            raise ValueError("must be from 1 to 64, and a range must not end below its beginning")
        return numbers

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True, slots=True)
class Demand:
    """The workers that are there and the requests that they have, at one moment."""

    num_workers: int
    """Workers that are ready or start, without those that are being removed."""
    num_ready: int
    num_slots: int
    """Slots of those that are ready."""
    num_running: int
    num_waiting: int


class Change(Enum):
    """A change of the number of workers."""

    ADD = auto()
    REMOVE = auto()


class Scaler:
    """Asks for a worker when requests have waited for some seconds without a break, and gives one back when one less
    would have been enough for a minute."""

    def __init__(self, limits: WorkerRange, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._full_since: float | None = None
        self._quiet_since: float | None = None

    def change(self, demand: Demand) -> Change | None:
        """Returns what to do now. To be asked about every second."""
        now = self._clock()
        if demand.num_ready < demand.num_workers:
            # The worker that starts is the answer to what was asked before.
            self._full_since = self._quiet_since = None
            return None
        slots_of_one = demand.num_slots // max(1, demand.num_ready)
        # A request waits only if no worker has room for it.
        is_full = demand.num_waiting > 0
        is_quiet = not is_full and demand.num_running <= demand.num_slots - slots_of_one
        self._full_since = _since(self._full_since, now) if is_full else None
        self._quiet_since = _since(self._quiet_since, now) if is_quiet else None
        if demand.num_workers < self._limits.most and _has_lasted(self._full_since, now, GROW_AFTER_SECONDS):
            self._full_since = None
            return Change.ADD
        if demand.num_workers > self._limits.least and _has_lasted(self._quiet_since, now, SHRINK_AFTER_SECONDS):
            self._quiet_since = None
            return Change.REMOVE
        return None


def _since(since: float | None, now: float) -> float:
    return now if since is None else since


def _has_lasted(since: float | None, now: float, seconds: float) -> bool:
    return since is not None and now - since >= seconds
