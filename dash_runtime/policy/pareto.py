"""Pareto fronts over cost and divergence. Knows numbers only."""

from collections.abc import Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")


def undominated(items: Iterable[_Item], rank: Callable[[_Item], tuple[float, ...]]) -> list[_Item]:
    """Returns the items that no other beats in cost and divergence, by ascending cost.

    `rank` gives cost, divergence, and what decides between items that are equal in both.
    """
    kept: list[_Item] = []
    for item in sorted(items, key=rank):
        if not kept or rank(item)[1] < rank(kept[-1])[1]:
            kept.append(item)
    return kept
