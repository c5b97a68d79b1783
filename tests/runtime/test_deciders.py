"""Rows of a batch ask their policy only where their skips can save more than asking takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.planner import GroupPlanner, HighestAction
from dash_runtime.events import TokenProduced
from dash_runtime.passes import Planner
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.random_policy import random_policy
from tests.runtime.support import drain, load_decoder, some_costs

BY_THE_ROW = LatencyTable((1, 8), {action: (action - 0.9, 8 * (action - 0.9)) for action in Action})
"""Each row takes as long as the first: a skip saves as much in a batch as alone."""
SHARED = LatencyTable((1, 8), {action: (action - 0.9, action - 0.9) for action in Action}, split_seconds=9)
"""All rows take as long as one: a skip saves nothing until all rows skip."""
EVALUATION = 0.001
"""A policy's evaluation, as a share of a full-depth token."""


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> LearnedPolicy:
    return random_policy(tiny_folder, block_size=1)


def plans(
    folder: Path,
    policy: LearnedPolicy,
    planner: Planner | None,
    num_rows: int,
    num_at_full_depth: int = 0,
    evaluation: float = EVALUATION,
) -> list[list[bytes]]:
    """Returns the plans of each row's decode tokens, those at full depth last."""
    decoder, costs = load_decoder(folder, torch.bfloat16), replace(some_costs(), evaluation=evaluation)
    catalog = PolicyCatalog(costs, policy.score_actions, policy.compensation, [policy], None, {}, 1.0, ())
    config = EngineConfig(num_slots=8, cache_tokens=512)
    engine: Engine = assemble_engine(decoder, catalog, config, 64, frozenset(), planner)
    adaptive, num_rows = SkipOptions(Mode.ADAPTIVE, 0.6, policy.name), num_rows + num_at_full_depth
    for row in range(num_rows):
        skip = adaptive if row < num_rows - num_at_full_depth else SkipOptions(Mode.FULL_DEPTH)
        own = GenerationRequest(str(row), [1, 2 + row], StoppingParameters(6), skip=skip, return_decisions=True)
        engine.submit(own)
    events = drain(engine)
    return [
        [event.plan for event in events[str(row)] if isinstance(event, TokenProduced)][1:] for row in range(num_rows)
    ]


@pytest.mark.parametrize("planner", [GroupPlanner(BY_THE_ROW), None], ids=["a skip saves", "no planner"])
def test_rows_ask_where_their_skips_save_or_where_they_must_not_depend_on_others(
    tiny_folder: Path, policy: LearnedPolicy, planner: Planner | None
) -> None:
    together = plans(tiny_folder, policy, planner, 6)
    assert len({plan for own in together for plan in own}) > 6


def test_rows_do_not_ask_where_asking_takes_longer_than_their_skips_save(
    tiny_folder: Path, policy: LearnedPolicy
) -> None:
    together = plans(tiny_folder, policy, GroupPlanner(SHARED), 6)
    unasked = policy.unasked(1.0)
    assert {plan for own in together for plan in own} == {bytes(unasked.plan)}
    assert all(unasked.plan[layer] is action for layer, action in policy.pinned.items())
    assert Action.SKIP not in unasked.plan


def test_a_row_alone_asks_whatever_a_batch_would_do(tiny_folder: Path, policy: LearnedPolicy) -> None:
    assert len(set(plans(tiny_folder, policy, GroupPlanner(SHARED), 1)[0])) > 1


def asks(policy: LearnedPolicy, own: list[bytes]) -> bool:
    return {*own} != {bytes(policy.unasked(1.0).plan)}


@pytest.mark.parametrize(("num_rows", "expected"), [(1, True), (2, True), (3, False)])
def test_with_graphs_rows_ask_only_if_all_of_them_may_skip_a_layer_often_enough(
    tiny_folder: Path, policy: LearnedPolicy, num_rows: int, expected: bool
) -> None:
    for own in plans(tiny_folder, policy, HighestAction(), num_rows, evaluation=0.0001):
        assert asks(policy, own) is expected


def test_with_graphs_a_row_beside_one_at_full_depth_does_not_ask(tiny_folder: Path, policy: LearnedPolicy) -> None:
    own, _ = plans(tiny_folder, policy, HighestAction(), 1, num_at_full_depth=1, evaluation=0.0)
    assert not asks(policy, own)


def test_the_cost_that_all_rows_save_falls_with_the_power_of_their_number() -> None:
    costs = some_costs()
    alone = costs.layer[Action.FULL] - costs.layer[Action.SKIP]
    for num_rows in (1, 2, 5):
        assert HighestAction().cost_saved(costs, Action.FULL, num_rows, 0.4) == pytest.approx(alone * 0.4**num_rows)
