"""Computes rates, percentiles and text histograms of a load. Knows numbers only, no server and no terminal."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

from dash_client.types import SpeculationUsage

_ROWS = 8
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
BAR_CHARACTERS = "█" + _EIGHTHS


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are seconds on one clock."""

    sent: float
    ended: float
    arrivals: tuple[tuple[float, int], ...]
    """For each message with tokens: its time, and its number of tokens."""
    error: str | None
    """The kind of error that ended it, or None for a complete answer."""
    drafts: SpeculationUsage | None = None
    """The drafts of a complete answer in mode "exact"."""

    @property
    def token_count(self) -> int:
        return sum(count for _, count in self.arrivals)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Three percentiles of some measurements."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The results of a load. Rates and times are of complete answers only, and None if there are none."""

    completed: int
    errors: dict[str, int]
    """Number of failed requests by kind of error."""
    wall_seconds: float
    """From sending the first request to the end of the last."""
    output_token_count: int
    tokens_per_second: float | None
    """All streams together, over the wall time."""
    stream_tokens_per_second: Percentiles | None
    """Each stream alone, from its first token on."""
    time_to_first_token_seconds: Percentiles | None
    """From sending the request; includes the wait in the server's queue."""
    inter_token_seconds: Percentiles | None
    """Between two tokens of a stream. A message with n tokens counts as n equal intervals."""
    drafts: SpeculationUsage | None
    """The drafts of all complete answers; None if none drafted."""


def figures(samples: Sequence[Sample]) -> Figures:
    """Computes the figures of these requests."""
    complete = [sample for sample in samples if sample.error is None]
    wall = max(sample.ended for sample in samples) - min(sample.sent for sample in samples) if samples else 0.0
    tokens = sum(sample.token_count for sample in complete)
    return Figures(
        completed=len(complete),
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None).most_common()),
        wall_seconds=wall,
        output_token_count=tokens,
        tokens_per_second=tokens / wall if tokens and wall > 0 else None,
        stream_tokens_per_second=percentiles(stream_rates(complete)),
        time_to_first_token_seconds=percentiles(first_token_times(complete)),
        inter_token_seconds=percentiles(inter_token_times(complete)),
        drafts=_total([sample.drafts for sample in complete if sample.drafts is not None]),
    )


def _total(drafts: Sequence[SpeculationUsage]) -> SpeculationUsage | None:
    if not any(own.drafted_token_count for own in drafts):
        return None
    names = [field.name for field in fields(SpeculationUsage) if field.name != "accepted_length_counts"]
    sums: dict[str, Any] = {name: sum(getattr(own, name) for own in drafts) for name in names}
    lengths = zip_longest(*(own.accepted_length_counts for own in drafts), fillvalue=0)
    return SpeculationUsage(**sums, accepted_length_counts=tuple(map(sum, lengths)))


def first_token_times(samples: Iterable[Sample]) -> list[float]:
    """Returns the seconds from sending to the first token, for each request that has one."""
    return [sample.arrivals[0][0] - sample.sent for sample in samples if sample.arrivals]


def inter_token_times(samples: Iterable[Sample]) -> list[float]:
    """Returns the seconds between tokens, over all requests."""
    times: list[float] = []
    for sample in samples:
        for (before, _), (at, count) in zip(sample.arrivals, sample.arrivals[1:], strict=False):
            times += [(at - before) / count] * count
    return times


def stream_rates(samples: Iterable[Sample]) -> list[float]:
    """Returns the tokens per second of each request, after its first message."""
    rates = []
    for sample in samples:
        if len(sample.arrivals) > 1 and (seconds := sample.arrivals[-1][0] - sample.arrivals[0][0]) > 0:
            rates.append((sample.token_count - sample.arrivals[0][1]) / seconds)
    return rates


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Returns percentiles, interpolated between neighbours; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Percentiles(*(_percentile(ordered, share) for share in (0.5, 0.9, 0.99)))


def _percentile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def histogram(values: Sequence[float], *, unicode: bool) -> list[str]:
    """Returns lines with a bar for each range of values. Values above the 99th percentile share the last line.

    Args:
        values: seconds, at least one.
        unicode: True if bars may use block characters.
    """
    ordered = sorted(values)
    low, high = ordered[0], _percentile(ordered, 0.99)
    if high <= low:
        high = ordered[-1]
    rows = _ROWS if high > low else 1
    width = (high - low) / rows
    counts = [0] * rows
    for value in ordered:
        counts[min(int((value - low) / width), rows - 1) if width > 0 else 0] += 1
    lines = []
    for row, count in enumerate(counts):
        end = ordered[-1] if row == rows - 1 else low + width * (row + 1)
        bar = _bar(count / max(counts), unicode=unicode)
        lines.append(f"{1000 * (low + width * row):>9.1f} … {1000 * end:>9.1f} ms  {bar:<{_BAR_WIDTH}}  {count}")
    return lines if unicode else [line.replace("…", "..") for line in lines]


def _bar(share: float, *, unicode: bool) -> str:
    if not unicode:
        return "#" * math.ceil(share * _BAR_WIDTH)
    whole, eighths = divmod(math.ceil(share * _BAR_WIDTH * 8), 8)
    return "█" * whole + (_EIGHTHS[eighths] if eighths else "")
