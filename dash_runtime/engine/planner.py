"""The planner of a batch: decides when rows should agree on one action.

The rows of one action run as a group. Most of a group's time is reading weights, however few rows it has, so two groups
may take longer than one that does more work. Knows actions and seconds; knows no tensors, no layers and no requests.
Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product

from dash_runtime.actions import Action, CostTable, LatencyTable

_MAX_REMEMBERED = 8192
"""More than all ways to spread 16 rows over four actions; with more rows, a bound."""


class HighestAction:
    """Raises rows that run a layer to the highest action among them: a device with graphs has one for each action.

    Rows that skip the layer keep doing so, and save nothing unless all do. It has no latencies: a few rows take about
    as long as one.
    """

    latencies = None

    def cost_saved(self, costs: CostTable, action: Action, num_rows: int, skip_share: float) -> float:
        """Returns what all rows of a pass are expected to save of a layer, as a share of a full-depth token, if each
        skips it with probability `skip_share`, independently, instead of running `action`."""
        return max(0.0, costs.layer[action] - costs.layer[Action.SKIP]) * skip_share**num_rows

    def agree(self, actions: Sequence[Action]) -> Sequence[Action]:
        taken = set(actions)
        if len(taken) == 1 or (len(taken) == 2 and Action.SKIP in taken):
            return actions
        highest = max(taken)
        return [action if action is Action.SKIP else highest for action in actions]


class GroupPlanner:
    """Raises rows to a common action where that makes the layer cheaper; never lowers one.

    Rows of the same action stay together: their group stays as it is, or joins a higher one as a whole.

    Args:
        latencies: this device's own table, with every action that a row may have.
    """

    def __init__(self, latencies: LatencyTable) -> None:
        self.latencies = latencies
        self._actions = sorted(latencies.seconds)
        self._cheapest_levels = lru_cache(_MAX_REMEMBERED)(self._find_cheapest_levels)

    def agree(self, actions: Sequence[Action]) -> Sequence[Action]:
        """Returns the actions to run, row by row: `actions` itself if nothing is cheaper."""
        levels = self._cheapest_levels(tuple(map(actions.count, self._actions)))
        return actions if levels is None else [levels[action] for action in actions]

    def seconds_saved(self, action: Action, num_rows: int, skip_share: float) -> float:
        """Returns the seconds that so many rows are expected to save of a layer if each skips it with probability
        `skip_share`, independently, instead of running `action`."""
        together, saved = self.latencies.cost(action, num_rows), 0.0
        for num_skipped in range(1, num_rows + 1):
            num_left = num_rows - num_skipped
            apart = self._seconds({Action.SKIP: num_skipped, action: num_left} if num_left else {Action.SKIP: num_rows})
            probability = math.comb(num_rows, num_skipped) * skip_share**num_skipped * (1 - skip_share) ** num_left
            saved += probability * max(0.0, together - apart)
        return saved

    def _seconds(self, num_rows: Mapping[Action, int]) -> float:
        """Returns the seconds of a layer whose rows run in groups, by their actions."""
        seconds = [self.latencies.cost(action, count) for action, count in num_rows.items()]
        return math.fsum(seconds) + (len(seconds) - 1) * self.latencies.split_seconds

    def _find_cheapest_levels(self, counts: tuple[int, ...]) -> Mapping[Action, Action] | None:
        """Returns the action that each taken action becomes, given the number of rows of each; None if all stay.

        Of equally cheap ways, takes the one that raises least, summed over the rows.
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
            return self._seconds(rows_by_level), raised

        cheapest = min(candidates, key=order)
        return None if cheapest == own else dict(zip(own, cheapest, strict=True))
