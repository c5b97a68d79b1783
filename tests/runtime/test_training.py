"""Rollouts equal serving's steps, and budgets are what they say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import tokenizer_file
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_path
from dash_runtime.engine.decider import Decider, plan_of
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.draft_length import USUAL_LENGTHS, USUAL_VERIFICATION_COST, drafting_gain
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Token
from dash_runtime.rollout.choices import greedy_choice
from dash_runtime.rollout.rollout import divergences, roll_out
from dash_runtime.rollout.task import Task, greedy_outcome
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.training.calibrate import calibrate
from tests.runtime.support import (
    full_plan,
    load_decoder,
    new_cache,
    run_rows,
    some_costs,
    some_low_rank,
    some_network,
    some_policy,
)
from tests.tiny_models import NUM_LAYERS

ACTIONS = tuple(Action)
PINNED = (0, 5)


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


@pytest.fixture(scope="module")
def sequences(tiny_folder: Path) -> list[list[int]]:
    return default_token_sequences(tokenizer_file(tiny_folder), 12, 24)


def make_task(decoder: Decoder, lookahead: int = 1, block_size: int = 3) -> Task:
    pinned = dict.fromkeys((*PINNED, *range(lookahead)), Action.FULL)
    spec = PlanSpec(
        actions=ACTIONS, pinned=pinned, lookahead=lookahead, block_size=block_size, head=Action.FULL, costs=some_costs()
    )
    return Task(decoder=decoder, spec=spec, compensation=some_low_rank(decoder), num_prompt_tokens=4)


def make_network(task: Task) -> PolicyNetwork:
    return some_network(task.spec, task.decoder.config.hidden_size)


@pytest.mark.parametrize(
    ("lookahead", "block_size", "pinned_action"),
    [(1, 1, Action.FULL), (2, 1, Action.FULL), (1, 3, Action.FULL), (2, 2, Action.INT8)],
)
@torch.no_grad()
def test_a_rollouts_actions_and_states_are_those_of_serving_for_the_same_tokens(
    decoder: Decoder, sequences: list[list[int]], lookahead: int, block_size: int, pinned_action: Action
) -> None:
    task = make_task(decoder, lookahead, block_size)
    task = replace(task, spec=replace(task.spec, pinned=dict.fromkeys(task.spec.pinned, pinned_action)))
    network = make_network(task)
    size = decoder.config.hidden_size
    policy = some_policy(task.spec, size, (0.5, 0.0, 0.1), compensation=task.compensation)
    batch = sequences[:2]
    rolled = task.roll_out(batch, greedy_choice(task.spec, network, torch.tensor(0.0)))
    assert len(rolled.actions[1:5].unique()) >= 3
    for number, ids in enumerate(batch):
        cache = new_cache(decoder)
        run_rows(decoder, [cache], [ids[:4]], [full_plan(decoder)])
        for place in range(4, len(ids)):
            row = number * len(ids) + place
            decider = Decider(policy, InlineLane(), [0], [Token(0, place, price=1.0)], task.spec.costs, 1)
            rows = decoder.batch(PassKind.DECODE, [cache], [1], [task.compensation], [policy.kv_action])
            served = decoder.run_pass(plan_of([decider], None), [ids[place]], rows)
            rows.commit()
            assert served.plans[0] == bytes(rolled.actions[:, row].tolist())
            expected = decoder.logits(rolled.states[-1][row : row + 1], (Action.FULL,))
            torch.testing.assert_close(served.logits, expected, atol=1e-3, rtol=1e-3)


def test_prompt_rows_and_pinned_layers_run_in_full_and_cost_adds_up(
    decoder: Decoder, sequences: list[list[int]]
) -> None:
    task = make_task(decoder)
    rows = task.decided_rows(sequences[:1])
    rolled = roll_out(
        decoder,
        sequences[:1],
        rows,
        task.spec,
        Identity(),
        lambda block, hidden, *_: torch.full((len(block), len(hidden)), int(Action.SKIP)),
    )
    full = int(Action.FULL)
    assert (rolled.actions[:, ~rows] == full).all()
    assert (rolled.actions[[0, 5]] == full).all()
    assert (rolled.actions[1:5][:, rows] == int(Action.SKIP)).all()
    layer = task.spec.costs.layer
    assert float(rolled.cost_spent[-1][-1]) == pytest.approx(2 * layer[Action.FULL] + 4 * layer[Action.SKIP])


def test_acceptance_is_what_two_distributions_share(decoder: Decoder, sequences: list[list[int]]) -> None:
    full = full_path(decoder, sequences[:1])[-1]
    ours = full.roll(1, dims=0)
    judged = divergences(decoder, full, ours, Action.FULL)
    p, q = (torch.softmax(decoder.logits(own, (Action.FULL,) * len(own)), -1) for own in (full, ours))
    torch.testing.assert_close(judged.acceptance, torch.minimum(p, q).sum(-1))
    assert float(divergences(decoder, full, full, Action.FULL).acceptance.min()) == pytest.approx(1)


def test_a_drafter_is_recommended_where_drafting_gains_most(decoder: Decoder, sequences: list[list[int]]) -> None:
    task = make_task(decoder)
    own = calibrate(task, make_network(task), sequences[:2], print).budgets(task.spec, task.spec.costs)
    gains = []
    for point in own.points:
        lengths = (drafting_gain(point.agreement, point.cost, k, USUAL_VERIFICATION_COST) for k in USUAL_LENGTHS)
        gains.append((max(lengths), point.cost))
    assert own.best_for_drafting == max(gains)[1]


def test_full_depth_has_no_divergence_from_itself(decoder: Decoder, sequences: list[list[int]]) -> None:
    network = make_network(make_task(decoder))
    network.output_weight.zero_()
    network.output_bias.fill_(5.0)[..., ACTIONS.index(Action.FULL)] = -9.0
    outcome, _ = greedy_outcome(make_task(decoder), network, sequences[:2], 1.0)
    assert outcome.divergence == pytest.approx(0, abs=1e-5)
    assert outcome.agreement == 1
    assert outcome.cost == pytest.approx(1)


def test_calibrated_budgets_ascend_and_are_kept_on_the_same_text(decoder: Decoder, sequences: list[list[int]]) -> None:
    task = make_task(decoder)
    network = make_network(task)
    calibration = calibrate(task, network, sequences[:3], print)
    assert [sum(point.counts.values()) for point in calibration.points] == pytest.approx(
        [NUM_LAYERS] * len(calibration.points), abs=1e-4
    )
    dearer = replace(task.spec.costs, evaluation=0.01)
    budgets, with_evaluations = (calibration.budgets(task.spec, costs) for costs in (task.spec.costs, dearer))
    costs = [point.cost for point in budgets.points]
    assert costs == sorted(costs)
    for budget in costs:
        outcome, _ = greedy_outcome(task, network, sequences[:3], budgets.price(budget))
        assert outcome.cost == pytest.approx(budget, abs=1e-5)
    assert with_evaluations.lowest == pytest.approx(budgets.lowest + 0.01 * task.spec.num_evaluations)
