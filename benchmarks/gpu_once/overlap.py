"""The overlap in a profiler's trace: the share of the policy's kernel time inside the decoder's.

The trace is kept, for a look at it. Knows traces; `record` also knows how a trace is made.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]
"""Begin and end in µs."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Kernels of one trace. The decoder's stream is the busiest one; all others are the policy's."""

    decoder_us: float
    """Time in which a kernel of the decoder's stream ran."""
    idle_us: float
    """Time between the first and the last of them in which none ran."""
    policy_us: float
    """The sum of the policy's kernels."""
    inside_us: float
    """The part of that in which a kernel of the decoder ran too."""

    @property
    def share_inside(self) -> float | None:
        """None if no policy's kernel ran on a stream of its own."""
        return self.inside_us / self.policy_us if self.policy_us else None


def record(work: Callable[[], object], path: Path, activities: Sequence[ProfilerActivity]) -> None:
    """Runs `work` under the profiler, and writes its trace to `path`, which ends in `.json.gz`."""
    with profile(activities=list(activities)) as profiler:
        work()
    profiler.export_chrome_trace(str(path))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Returns the events of a trace that `record` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def overlap_of(events: Iterable[dict[str, Any]]) -> Overlap | None:
    """Returns what the events say of the streams' kernels; None if there are no kernels."""
    streams: dict[int, list[Interval]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel" and event.get("ph") == "X":
            begin = float(event["ts"])
            streams[event["args"]["stream"]].append((begin, begin + float(event["dur"])))
    if not streams:
        return None
    decoder = max(streams, key=lambda stream: sum(end - begin for begin, end in streams[stream]))
    busy = _union(streams[decoder])
    policy = [own for stream, intervals in streams.items() if stream != decoder for own in intervals]
    decoder_us = _total(busy)
    return Overlap(
        decoder_us,
        busy[-1][1] - busy[0][0] - decoder_us,
        _total(policy),
        sum(_inside(own, busy) for own in policy),
    )


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the intervals merged where they touch, ascending."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _inside(own: Interval, others: Iterable[Interval]) -> float:
    return sum(max(0.0, min(own[1], end) - max(own[0], begin)) for begin, end in others)


def _total(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
