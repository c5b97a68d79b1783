"""Rollouts equal serving's steps, and a training run can be stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dash_runtime.training.actor_critic import ActorCritic
from dash_runtime.training.ppo import Objective, PpoSettings, TrainingDiverged, collect, update

from dash_runtime.actions import Action
from dash_runtime.checkpoints import tokenizer_file
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_path
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.engine.step import Decider, decode_step
from dash_runtime.errors import PolicyFileError
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity, LowRank
from dash_runtime.policy.draft_length import USUAL_LENGTHS, USUAL_VERIFICATION_COST, drafting_gain
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Token
from dash_runtime.rollout.choices import greedy_choice
from dash_runtime.rollout.rollout import divergences, roll_out
from dash_runtime.rollout.task import Task, greedy_outcome
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.training.calibrate import calibrate
from dash_runtime.training.checkpoint import num_iterations_done
from dash_runtime.training.train import TrainSettings, train
from tests.runtime.support import (
    full_plan,
    load_decoder,
    new_cache,
    run_rows,
    some_calibration,
    some_costs,
    some_low_rank,
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
        actions=ACTIONS,
        pinned=pinned,
        lookahead=lookahead,
        block_size=block_size,
        head=Action.FULL,
        costs=some_costs(),
    )
    return Task(decoder=decoder, spec=spec, compensation=some_low_rank(decoder), num_prompt_tokens=4)


def make_model(task: Task, seed: int = 0, spread: float = 1.0) -> ActorCritic:
    """Makes a model whose scores differ enough between states that every action is taken."""
    model = ActorCritic(task.spec, task.decoder.config.hidden_size, seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model.actor.output_weight.copy_(torch.randn(model.actor.output_weight.shape, generator=generator) * spread)
        model.actor.output_bias.zero_()
    return model


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
    network = make_model(task).network()
    policy = LearnedPolicy(
        name="p",
        network=network,
        spec=task.spec,
        compensation=task.compensation,
        calibration=some_calibration(task.spec, (0.5, 0.0, 0.1)),
    )
    batch = sequences[:2]
    rolled = task.roll_out(batch, greedy_choice(task.spec, network, torch.tensor(0.0)))
    assert len(rolled.actions[1:5].unique()) >= 3
    for number, ids in enumerate(batch):
        cache = new_cache(decoder)
        run_rows(decoder, [cache], [ids[:4]], [full_plan(decoder)])
        for place in range(4, len(ids)):
            row = number * len(ids) + place
            decider = Decider(policy, [0], [Token(0, place, price=1.0)], task.spec.costs, 1)
            rows = decoder.batch(PassKind.DECODE, [cache], [1], [task.compensation], [policy.kv_action])
            served = decode_step(decoder, InlineLane(), rows, [ids[place]], [decider])
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
    assert Objective.ACCEPTANCE.loss(judged).equal(1 - judged.acceptance)
    assert Objective.DIVERGENCE.loss(judged).equal(judged.divergence)
    assert float(divergences(decoder, full, full, Action.FULL).acceptance.min()) == pytest.approx(1)


def test_a_drafter_is_recommended_where_drafting_gains_most(decoder: Decoder, sequences: list[list[int]]) -> None:
    task = make_task(decoder)
    own = calibrate(task, make_model(task).network(), sequences[:2]).budgets(task.spec, task.spec.costs)
    gains = []
    for point in own.points:
        lengths = (drafting_gain(point.agreement, point.cost, k, USUAL_VERIFICATION_COST) for k in USUAL_LENGTHS)
        gains.append((max(lengths), point.cost))
    assert own.best_for_drafting == max(gains)[1]


def test_full_depth_has_no_divergence_from_itself(decoder: Decoder, sequences: list[list[int]]) -> None:
    network = make_model(make_task(decoder)).network()
    network.output_weight.zero_()
    network.output_bias[..., ACTIONS.index(Action.FULL)] = 1.0
    outcome, _ = greedy_outcome(make_task(decoder), network, sequences[:2], 1.0)
    assert outcome.divergence == pytest.approx(0, abs=1e-5)
    assert outcome.agreement == 1
    assert outcome.cost == pytest.approx(1)


def test_training_finds_the_cheap_action_when_compute_is_dear(decoder: Decoder, sequences: list[list[int]]) -> None:
    task = make_task(decoder)
    model = make_model(task, spread=0.01)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    settings = PpoSettings(divergence_limit=0.1, minibatch_rows=128)
    log_price = torch.full((4 * 24,), 2.0)
    torch.manual_seed(0)
    before = greedy_outcome(task, model.network(), sequences[:4], 7.0)[0].cost
    for step in range(30):
        experience, _ = collect(task, model, sequences[:4], 2, log_price, settings)
        update(task, model, optimizer, experience, 0.0, settings, torch.Generator().manual_seed(step))
    after = greedy_outcome(task, model.network(), sequences[:4], 7.0)[0].cost
    lowest = task.spec.costs.token_cost([Action.FULL, *[Action.SKIP] * 4, Action.FULL], Action.FULL)
    assert after < before
    assert after == pytest.approx(lowest, abs=0.05)


def test_a_stopped_run_ends_as_one_that_was_not_stopped(
    decoder: Decoder, sequences: list[list[int]], tmp_path: Path
) -> None:
    task = make_task(decoder)
    settings = TrainSettings(iterations=6, sequences_per_iteration=2, checkpoint_every=2, refits=(3, 4))

    class Stop(Exception):
        pass

    def stop_at_four(iteration: int, *_: object) -> None:
        if iteration == 4:
            raise Stop

    def refit(current: Task, latest: LowRank, network: PolicyNetwork, seed: int) -> LowRank:
        """Returns a compensation that depends on everything that a real refit depends on."""
        torch.manual_seed(seed)
        down = latest.down + network.output_bias.sum() * torch.randn(()) * 1e-3
        return replace(latest, down=down)

    whole = train(
        task, some_low_rank(decoder), sequences, settings, tmp_path / "whole.safetensors", lambda *_: None, refit
    )
    with pytest.raises(Stop):
        train(task, some_low_rank(decoder), sequences, settings, tmp_path / "stopped.safetensors", stop_at_four, refit)
    seen: list[int] = []
    resumed = train(
        task,
        some_low_rank(decoder),
        sequences,
        settings,
        tmp_path / "stopped.safetensors",
        lambda i, *_: seen.append(i),
        refit,
    )
    assert seen == [4, 5]
    for name in PolicyNetwork.__slots__:
        assert torch.equal(getattr(whole.network, name), getattr(resumed.network, name)), name
    assert torch.equal(whole.compensation.down, resumed.compensation.down)
    assert not torch.equal(whole.compensation.down, some_low_rank(decoder).down)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    decoder: Decoder, sequences: list[list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    settings = TrainSettings(iterations=2, sequences_per_iteration=1, checkpoint_every=1)

    def take_the_folder_away(iteration: int, *_: object) -> None:
        if iteration == 1:
            tmp_path.rename(tmp_path.with_name("moved"))

    with pytest.raises(PolicyFileError, match="cannot be written"):
        train(make_task(decoder), some_low_rank(decoder), sequences, settings, path, take_the_folder_away)
    tmp_path.with_name("moved").rename(tmp_path)
    assert num_iterations_done(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_refused_by_name(
    decoder: Decoder, sequences: list[list[int]], tmp_path: Path
) -> None:
    task = make_task(decoder)
    settings = TrainSettings(iterations=1, sequences_per_iteration=1)
    path = tmp_path / "checkpoint.safetensors"
    train(task, some_low_rank(decoder), sequences, settings, path, lambda *_: None)
    with pytest.raises(PolicyFileError, match=r"checkpoint\.safetensors.*another run"):
        train(task, some_low_rank(decoder), sequences, replace(settings, seed=1), path, lambda *_: None)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(PolicyFileError, match=r"checkpoint\.safetensors"):
        train(task, some_low_rank(decoder), sequences, settings, path, lambda *_: None)


def test_a_loss_that_is_not_a_number_stops_the_run(decoder: Decoder, sequences: list[list[int]]) -> None:
    task = make_task(decoder)
    model = make_model(task)
    settings = PpoSettings()
    experience, _ = collect(task, model, sequences[:1], 2, torch.zeros(24), settings)
    broken = replace(experience, returns=experience.returns * float("nan"))
    with pytest.raises(TrainingDiverged):
        update(task, model, torch.optim.Adam(model.parameters()), broken, 0.0, settings, torch.Generator())


def test_calibrated_budgets_ascend_and_are_kept_on_the_same_text(decoder: Decoder, sequences: list[list[int]]) -> None:
    task = make_task(decoder)
    network = make_model(task).network()
    calibration = calibrate(task, network, sequences[:3])
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
