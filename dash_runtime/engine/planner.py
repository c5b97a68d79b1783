"""When rows should agree on one action: the planner of a batch.

Every action that some row takes makes a group of its own, and most of a group's time is reading weights, however few
rows it has. So two groups may take longer than one that does more work. Knows actions and seconds; knows no
tensors, no layers and no requests. Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product

from dash_runtime.actions import Action, LatencyTable

_MAX_REMEMBERED = 8192
"""More than all ways to spread 16 rows over four actions, and bounded where there are more rows."""


class GroupPlanner:
    """Raises rows to a common action where that makes the layer cheaper; never lowers one.

    Rows of the same action stay together: their group goes on as it is, or joins a higher one as a whole.

    Args:
        costs: this device's own table, with every action that a row may have.
    """

    def __init__(self, costs: LatencyTable) -> None:
        self._costs = costs
        self._actions = sorted(costs.seconds)
        self._cheapest_levels = lru_cache(_MAX_REMEMBERED)(self._find_cheapest_levels)

    def agree(self, actions: Sequence[Action]) -> Sequence[Action]:
        """The actions to run, row by row: `actions` itself where nothing is cheaper."""
        levels = self._cheapest_levels(tuple(map(actions.count, self._actions)))
        return actions if levels is None else [levels[action] for action in actions]

    def _find_cheapest_levels(self, counts: tuple[int, ...]) -> Mapping[Action, Action] | None:
        """What each action that a row takes becomes, from the rows of each action; None where all stay.

        Among equally cheap ways the one that raises least, summed over the rows.
        """
        taken = [(action, count) for action, count in zip(self._actions, counts, strict=True) if count]
        own = tuple(action for action, _ in taken)
        candidates = product(*([level for level in self._actions if level >= action] for action in own))

        def order(levels: tuple[Action, ...]) -> tuple[float, int]:
            rows_by_level = dict.fromkeys(sorted(levels), 0)
            raised = 0
            for level, (action, count) in zip(levels, taken, strict=True):
                rows_by_level[level] += count
                raised += (level - action) * count
            return math.fsum(self._costs.cost(level, count) for level, count in rows_by_level.items()), raised

        cheapest = min(candidates, key=order)
        return None if cheapest == own else dict(zip(own, cheapest, strict=True))
