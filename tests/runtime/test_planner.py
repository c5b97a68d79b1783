"""The planner's table, and its plans against all possible ones."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.engine.planner import GroupPlanner
from dash_runtime.errors import ConfigError

SKIP, INT3, INT4, INT8, FULL = Action
ROWS = (1, 2, 4, 8)

# Quantised layers read fewer bytes and compute longer, as on CPUs.
COSTS = LatencyTable(
    ROWS,
    {
        SKIP: (1, 2, 3, 5),
        INT3: (35, 52, 84, 160),
        INT4: (40, 56, 86, 161),
        INT8: (65, 90, 119, 211),
        FULL: (80, 95, 105, 157),
    },
)


def some_table(rng: random.Random) -> LatencyTable:
    """Returns random whole numbers, so that ties happen."""
    actions = sorted({FULL, *rng.sample(list(Action), rng.randint(1, 4))})
    return LatencyTable(ROWS, {action: tuple(rng.randint(0, 12) for _ in ROWS) for action in actions})


def table_of_diminishing_costs(rng: random.Random) -> LatencyTable:
    """Returns costs where a further row never costs more than the one before it."""
    rows = tuple(range(1, 7))
    slopes = {action: sorted((rng.random() for _ in rows), reverse=True) for action in Action}
    return LatencyTable(rows, {action: tuple(sum(slopes[action][:count]) for count in rows) for action in Action})


def some_actions(rng: random.Random, costs: LatencyTable, max_rows: int) -> list[Action]:
    return rng.choices(list(costs.seconds), k=rng.randint(1, max_rows))


def total(costs: LatencyTable, actions: Sequence[Action]) -> float:
    return sum(costs.cost(action, count) for action, count in Counter(actions).items())


def raised(before: Sequence[Action], after: Sequence[Action]) -> int:
    return sum(after) - sum(before)


def test_costs_lie_on_lines_between_the_measured_row_counts_and_beyond() -> None:
    measured = LatencyTable((1, 2, 4), {FULL: (10, 12, 20)})
    assert [measured.cost(FULL, count) for count in (0, 1, 2, 3, 4, 5, 8)] == [0, 10, 12, 16, 20, 24, 36]


def test_a_table_of_one_row_count_goes_on_in_proportion() -> None:
    assert LatencyTable((1,), {FULL: (3,)}).cost(FULL, 4) == 12


def test_no_further_row_makes_a_group_cheaper_than_the_largest_measured() -> None:
    assert LatencyTable((1, 2), {FULL: (3, 2)}).cost(FULL, 100) == 2


def test_a_table_survives_json() -> None:
    assert LatencyTable.from_json(json.loads(json.dumps(COSTS.to_json()))) == COSTS


@pytest.mark.parametrize("rows", [(), (0, 1), (2, 4), (1, 1), (1, 4, 2)])
def test_row_counts_that_do_not_ascend_from_one_are_refused(rows: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        LatencyTable(rows, {FULL: (1.0,) * len(rows)})
    assert error.value.field == "latency_table.rows"


@pytest.mark.parametrize(
    "seconds",
    [
        {},
        {SKIP: (1.0, 2.0)},
        {FULL: (1.0,)},
        {FULL: (1.0, 2.0), INT4: (1.0, 2.0, 3.0)},
        {FULL: (1.0, -1.0)},
        {FULL: (1.0, float("inf"))},
        {FULL: (1.0, float("nan"))},
    ],
)
def test_seconds_that_make_no_table_are_refused(seconds: dict[Action, tuple[float, ...]]) -> None:
    with pytest.raises(ConfigError) as error:
        LatencyTable((1, 2), seconds)
    assert error.value.field == "latency_table.seconds"


@pytest.mark.parametrize(
    "facts",
    [
        [],
        {},
        {"rows": [1]},
        {"rows": [1], "seconds": []},
        {"rows": [1], "seconds": {"NONE": [1]}},
        {"rows": 1, "seconds": {"FULL": [1]}},
        {"rows": [1], "seconds": {"FULL": ["fast"]}},
        {"rows": [2], "seconds": {"FULL": [1]}},
    ],
)
def test_json_that_describes_no_table_raises_one_of_the_documented_errors(facts: Any) -> None:
    with pytest.raises((ConfigError, AttributeError, KeyError, TypeError, ValueError)):
        LatencyTable.from_json(facts)


def test_the_plan_is_the_cheapest_of_all_and_raises_least_among_those() -> None:
    rng = random.Random(0)
    for _ in range(400):
        costs = some_table(rng)
        actions = some_actions(rng, costs, 12)
        levels = list(product(costs.seconds, repeat=len(costs.seconds)))
        ways = [dict(zip(costs.seconds, choice, strict=True)) for choice in levels]
        plans = [[way[action] for action in actions] for way in ways if all(way[own] >= own for own in way)]
        cheapest = min(total(costs, plan) for plan in plans)
        least = min(raised(actions, plan) for plan in plans if total(costs, plan) <= cheapest + 1e-9)
        agreed = GroupPlanner(costs).agree(actions)
        assert total(costs, agreed) == pytest.approx(cheapest)
        assert raised(actions, agreed) == least


def test_raising_single_rows_is_no_cheaper_where_further_rows_cost_less_and_less() -> None:
    rng = random.Random(1)
    for _ in range(60):
        costs = table_of_diminishing_costs(rng)
        actions = some_actions(rng, costs, 5)
        plans = product(*([level for level in Action if level >= action] for action in actions))
        assert total(costs, GroupPlanner(costs).agree(actions)) == pytest.approx(min(total(costs, p) for p in plans))


def test_no_row_is_lowered_and_equal_rows_stay_equal_in_their_places() -> None:
    rng = random.Random(2)
    for _ in range(400):
        costs = some_table(rng)
        actions = some_actions(rng, costs, 20)
        agreed = GroupPlanner(costs).agree(actions)
        assert all(after >= before for before, after in zip(actions, agreed, strict=True))
        assert len(set(zip(actions, agreed, strict=True))) == len(set(actions))


def test_the_order_of_rows_does_not_matter_to_any_of_them() -> None:
    rng = random.Random(3)
    planner = GroupPlanner(COSTS)
    actions = [SKIP, INT4, INT4, INT8, FULL, FULL]
    own = dict(zip(actions, planner.agree(actions), strict=True))
    assert own != {action: action for action in actions}
    for _ in range(10):
        rng.shuffle(actions)
        assert planner.agree(actions) == [own[action] for action in actions]


@pytest.mark.parametrize("action", Action)
def test_a_single_row_keeps_its_action_where_more_work_costs_more(action: Action) -> None:
    actions = (action,)
    assert GroupPlanner(COSTS).agree(actions) is actions


def test_a_single_row_is_raised_where_more_work_is_cheaper() -> None:
    planner = GroupPlanner(LatencyTable((1,), {SKIP: (1,), INT4: (9,), INT8: (8,), FULL: (10,)}))
    assert planner.agree((INT4,)) == [INT8]
    assert planner.agree((SKIP,)) == (SKIP,)


def test_rows_of_one_action_are_raised_together_where_that_is_cheaper() -> None:
    planner = GroupPlanner(COSTS)
    few, many = (INT8,) * 2, (INT8,) * 4
    assert planner.agree(few) is few
    assert planner.agree(many) == [FULL] * 4


def test_a_row_joins_a_group_that_runs_anyway() -> None:
    assert GroupPlanner(COSTS).agree([INT4, FULL, SKIP, FULL]) == [FULL, FULL, SKIP, FULL]


def test_actions_that_cost_the_same_are_left_alone() -> None:
    planner = GroupPlanner(LatencyTable(ROWS, dict.fromkeys(Action, (1, 2, 4, 8))))
    actions = [FULL, SKIP, INT8, INT4, SKIP]
    assert planner.agree(actions) is actions


def test_rows_stay_apart_only_if_that_saves_more_than_a_split_takes() -> None:
    seconds = {SKIP: (1, 2), FULL: (10, 14)}
    assert GroupPlanner(LatencyTable((1, 2), seconds, split_seconds=2)).agree([SKIP, FULL]) == [SKIP, FULL]
    assert GroupPlanner(LatencyTable((1, 2), seconds, split_seconds=4)).agree([SKIP, FULL]) == [FULL, FULL]
    assert GroupPlanner(LatencyTable((1, 2), seconds, split_seconds=4)).agree([SKIP, SKIP]) == [SKIP, SKIP]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_what_skips_are_expected_to_save_is_the_mean_over_all_ways_to_skip(num_rows: int) -> None:
    costs, share = replace(COSTS, split_seconds=7), 0.3
    expected = 0.0
    for actions in product((SKIP, INT4), repeat=num_rows):
        num_skipped = actions.count(SKIP)
        apart = total(costs, actions) + 7 * (len(set(actions)) - 1)
        saved = max(0.0, costs.cost(INT4, num_rows) - apart)
        expected += share**num_skipped * (1 - share) ** (num_rows - num_skipped) * saved
    assert GroupPlanner(costs).seconds_saved(INT4, num_rows, share) == pytest.approx(expected)
