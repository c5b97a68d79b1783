"""A queue that serves several callers in turns, weighted by the cost of their requests.

Start-time fair queuing (Goyal, Vin and Cheng, 1996). A request gets its tag when it reaches the head of its caller's
line. A caller with hundreds waiting delays another's first request by one of its own at most. Knows no network and no
worker.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

T = TypeVar("T")


class Priority(IntEnum):
    """The class of an item; a higher one is served first."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(slots=True)
class _Line(Generic[T]):
    """One caller's items, first come, first served. `tag` is the virtual start time of the first."""

    tag: float
    items: deque[tuple[T, float]] = field(default_factory=deque)
    """Each item with its virtual duration: its cost over the caller's weight."""


class FairQueue(Generic[T]):
    """Keeps each caller's items in order and takes callers in turns."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._now = 0.0
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def __iter__(self) -> Iterator[T]:
        return (item for line in self._lines.values() for item, _ in line.items)

    def push(self, item: T, caller: str, cost: float, weight: float = 1.0) -> None:
        """Appends to the caller's line. Twice the weight gets twice the cost served in the same time."""
        line = self._lines.get(caller)
        if line is None:
            line = self._lines[caller] = _Line(self._now)
        elif not line.items:
            line.tag = max(line.tag, self._now)
        line.items.append((item, cost / weight))
        self._num_items += 1

    def head(self) -> T | None:
        """Returns the next item; None if there is none."""
        line = self._next_line()
        return None if line is None else line.items[0][0]

    def pop(self) -> T:
        """Removes and returns the next item.

        Raises:
            IndexError: the queue is empty.
        """
        line = self._next_line()
        if line is None:
            raise IndexError("nothing waits")
        item, duration = line.items.popleft()
        self._now = line.tag
        line.tag += duration
        self._num_items -= 1
        self._forget_idle_lines()
        return item

    def remove(self, item: T, caller: str) -> None:
        """Removes an item without charging its caller."""
        line = self._lines[caller]
        line.items.remove(next(entry for entry in line.items if entry[0] is item))
        self._num_items -= 1
        self._forget_idle_lines()

    def num_waiting(self, caller: str) -> int:
        """Returns the number of items in the caller's line."""
        line = self._lines.get(caller)
        return 0 if line is None else len(line.items)

    def line_lengths(self) -> dict[str, int]:
        """Returns the number of items of each caller."""
        return {caller: len(line.items) for caller, line in self._lines.items()}

    def newest(self, caller: str) -> T:
        """Returns the last item in the caller's line, which must not be empty."""
        return self._lines[caller].items[-1][0]

    def num_ahead(self, caller: str) -> int:
        """Returns the number of items that would be served before a new one of this caller."""
        own = self._lines.get(caller)
        due = self._now if own is None else max(own.tag, self._now) + sum(duration for _, duration in own.items)
        ahead = 0 if own is None else len(own.items)
        for line in self._lines.values():
            tag = line.tag
            for _, duration in () if line is own else line.items:
                if tag > due:
                    break
                ahead += 1
                tag += duration
        return ahead

    def _next_line(self) -> _Line[T] | None:
        return min((line for line in self._lines.values() if line.items), key=lambda line: line.tag, default=None)

    def _forget_idle_lines(self) -> None:
        """Forgets callers whose past service no longer counts against them."""
        if not self._num_items:
            self._lines.clear()
            self._now = 0.0
            return
        idle = [caller for caller, line in self._lines.items() if not line.items and line.tag <= self._now]
        for caller in idle:
            del self._lines[caller]


class PriorityQueue(Generic[T]):
    """A fair queue for each class. One class is served only while none above it waits."""

    def __init__(self) -> None:
        self._classes: dict[Priority, FairQueue[T]] = {
            priority: FairQueue() for priority in sorted(Priority, reverse=True)
        }

    def push(self, item: T, priority: Priority, caller: str, cost: float, weight: float = 1.0) -> None:
        """Appends to the caller's line in this class."""
        self._classes[priority].push(item, caller, cost, weight)

    def head(self) -> T | None:
        """Returns the next item; None if there is none."""
        return self._next_queue().head()

    def pop(self) -> T:
        """Removes and returns the next item.

        Raises:
            IndexError: the queue is empty.
        """
        return self._next_queue().pop()

    def remove(self, item: T, priority: Priority, caller: str) -> None:
        """Removes an item without charging its caller."""
        self._classes[priority].remove(item, caller)

    def longest_line(self) -> tuple[str, int]:
        """Returns the caller with the most items in all classes, and their number; ("", 0) if there are none."""
        lengths: Counter[str] = Counter()
        for queue in self._classes.values():
            lengths.update(queue.line_lengths())
        return max(lengths.items(), key=lambda pair: pair[1], default=("", 0))

    def newest(self, caller: str) -> T:
        """Returns the last item in the caller's lowest line; it must have one."""
        return next(queue for queue in reversed(self._classes.values()) if queue.num_waiting(caller)).newest(caller)

    def num_ahead(self, priority: Priority, caller: str) -> int:
        """Returns the number of items that would be served before a new one of this class and caller."""
        above = sum(len(queue) for other, queue in self._classes.items() if other > priority)
        return above + self._classes[priority].num_ahead(caller)

    def _next_queue(self) -> FairQueue[T]:
        """Returns the queue of the highest class that waits; the lowest one, which is empty then, if none does."""
        return next((queue for queue in self._classes.values() if len(queue)), self._classes[Priority.LOW])
