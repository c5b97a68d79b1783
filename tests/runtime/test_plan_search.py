"""The search of fixed plans: real plans, measured with everything that they change."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import tokenizer_file
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError
from dash_runtime.policy.fixed_plans import MeasuredPlan, named, not_dominated
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.task import Task, path_outcome
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.startup.plan_search import MAX_PLANS, measure_plans, search_plans, search_text
from tests.runtime.support import some_affine, some_costs
from tests.tiny_models import NUM_LAYERS

COSTS = some_costs(NUM_LAYERS)


@pytest.fixture(scope="module")
def task(decoder: Decoder) -> Task:
    spec = PlanSpec.fixed((Action.FULL,) * NUM_LAYERS, Action.FULL, COSTS)
    return Task(decoder, spec, some_affine(decoder), num_prompt_tokens=4)


@pytest.fixture(scope="module")
def sequences(tiny_folder: Path) -> list[list[int]]:
    return default_token_sequences(tokenizer_file(tiny_folder), 3, 24)


@pytest.fixture(scope="module")
def plans(task: Task, sequences: list[list[int]]) -> tuple[MeasuredPlan, ...]:
    return search_plans(task, sequences)


def test_a_plan_diverges_as_far_as_it_says(
    task: Task, sequences: list[list[int]], plans: tuple[MeasuredPlan, ...]
) -> None:
    for plan in plans:
        outcome, actions = path_outcome(task.fixed(plan.actions, plan.head), sequences)
        assert outcome.divergence == pytest.approx(plan.divergence, abs=1e-6)
        assert outcome.cost == pytest.approx(plan.cost(COSTS), abs=1e-6)
        assert (actions == torch.tensor(plan.actions).unsqueeze(1)).all()


def test_a_larger_model_is_searched_on_less_text(decoder: Decoder) -> None:
    text = [[7] * 128] * 4
    larger = replace(decoder.config, vocab_size=500_000, hidden_size=1024)
    assert search_text(decoder.config, text) == text
    assert [len(ids) for ids in search_text(larger, text)] == [128]
    assert [len(ids) for ids in search_text(replace(larger, hidden_size=8192), text)] == [64]
    assert search_text(decoder.config, []) == []


def test_one_kernel_everywhere_is_always_there_and_the_others_are_the_frontier(plans: tuple[MeasuredPlan, ...]) -> None:
    uniform = {"fixed-int3", "fixed-int4", "fixed-int8", "full-depth"}
    assert uniform <= {plan.name for plan in plans}
    assert len({plan.name for plan in plans}) == len(plans) <= MAX_PLANS + len(uniform)
    others = [plan for plan in plans if plan.name not in uniform]
    assert set(others) <= set(not_dominated(plans, COSTS))
    assert all(a.cost(COSTS) <= b.cost(COSTS) for a, b in pairwise(plans))
    assert any(Action.SKIP in plan.actions for plan in others)


def test_only_the_actions_and_heads_that_are_asked_for_are_used(task: Task, sequences: list[list[int]]) -> None:
    own = search_plans(task, sequences[:1], (Action.FULL,), (Action.SKIP, Action.FULL))
    assert {action for plan in own for action in plan.actions} == {Action.SKIP, Action.FULL}
    assert {plan.head for plan in own} == {Action.FULL}


def test_plans_are_measured_on_another_text_as_on_their_own(
    task: Task, sequences: list[list[int]], plans: tuple[MeasuredPlan, ...]
) -> None:
    again = measure_plans(task, sequences, plans)
    assert [plan.divergence for plan in again] == pytest.approx([plan.divergence for plan in plans], abs=1e-6)
    (int4,) = (plan for plan in measure_plans(task, sequences[:1], plans) if plan.name == "fixed-int4")
    assert int4 not in plans


def test_text_that_ends_within_the_prompts_is_refused(task: Task, sequences: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="no sequence longer"):
        search_plans(replace(task, num_prompt_tokens=24), sequences)


def test_plans_of_the_same_cost_have_names_of_their_own() -> None:
    actions = [(Action.SKIP, *[Action.FULL] * (NUM_LAYERS - 1)), (*[Action.FULL] * (NUM_LAYERS - 1), Action.SKIP)] * 2
    names = [plan.name for plan in named((MeasuredPlan("", own, Action.FULL, 0.1) for own in actions), COSTS)]
    assert len(set(names)) == 4
    assert names[0] == "plan-0.89"
