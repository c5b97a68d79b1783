"""Runs comparisons in rounds: each contender once per round, in turn, in reversed order every other round.

Knows work that returns values by name; does not know what the work does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.figures import Report

Work = Callable[[], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Effort:
    """The amount of work. `stream_tokens` is the number of new tokens per stream when several run at once."""

    rounds: int
    num_tokens: int
    stream_tokens: int
    starts: int


FULL = Effort(rounds=7, num_tokens=128, stream_tokens=48, starts=3)
QUICK = Effort(rounds=3, num_tokens=32, stream_tokens=16, starts=1)


def interleaved(
    report: Report, what: str, works: Mapping[str, Work], rounds: int, has_time: Callable[[], bool] = lambda: True
) -> dict[str, list[float]]:
    """Returns all values by name, one per round. The first round warms up and is not counted.

    A work that fails once is left out, with a note: ratios need a value of every round. No round but the first two
    begins unless `has_time`.
    """
    taken: dict[str, list[Mapping[str, float]]] = {name: [] for name in works}
    for round_number in range(rounds + 1):
        if round_number > 1 and not has_time():
            report.note(f"{what}: {round_number - 1} of {rounds} rounds, since the time is over")
            break
        progress(f"{what}: {f'round {round_number} of {rounds}' if round_number else 'warming up'}")
        for name in list(taken) if round_number % 2 else list(reversed(taken)):
            result: Mapping[str, float] | None = None
            with report.attempt(f"{what}, {name}"):
                result = works[name]()
            if result is None:
                del taken[name]
            elif round_number > 0:
                taken[name].append(result)
    values: dict[str, list[float]] = {}
    for results in taken.values():
        for result in results:
            for name, value in result.items():
                values.setdefault(name, []).append(value)
    return values


def progress(text: str) -> None:
    print(text, flush=True)
