"""Labels are what brute force measures, networks fit them, and a training run can be stopped."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.errors import PolicyFileError
from dash_runtime.layers.compensation import LowRank
from dash_runtime.policy.network import PolicyNetwork, facts_of
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.choices import greedy_choice, random_choice
from dash_runtime.training.checkpoint import num_rounds_done
from dash_runtime.training.damage_model import DamageFit, DamageModel, FitSettings, harm, harm_slope
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.labels import Labels, measure_labels
from dash_runtime.training.loss import Judged, TrainingDiverged, divergences, judge
from dash_runtime.training.paths import Path as TokenPath
from dash_runtime.training.paths import decided_rows, run_path
from dash_runtime.training.train import Reached, Trainer, TrainSettings, price_weights
from tests.runtime.support import load_decoder, some_costs, some_low_rank
from tests.tiny_models import VOCAB_SIZE

LENGTH, PROMPT = 20, 4
QUICK = TrainSettings(
    rounds=3, batches=2, sequences=4, num_prompt_tokens=PROMPT, fit=FitSettings(16, 8, rows_per_step=256)
)


def some_spec(actions: tuple[Action, ...] = tuple(Action)) -> PlanSpec:
    pinned = dict.fromkeys((0, 5), Action.FULL)
    return PlanSpec(actions, pinned, lookahead=1, block_size=1, head=Action.FULL, costs=some_costs())


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> DenseDecoder:
    config, weights = load_model_config(tiny_folder), open_weights(tiny_folder)
    return DenseDecoder(config, weights, tuple(Action), dtype=torch.float32)


@pytest.fixture(scope="module")
def compensation(tiny_folder: Path) -> LowRank:
    return some_low_rank(load_decoder(tiny_folder))


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return torch.randint(VOCAB_SIZE, (40, LENGTH), generator=torch.Generator().manual_seed(8)).tolist()


def nothing_added(compensation: LowRank) -> LowRank:
    return replace(compensation, up=torch.zeros_like(compensation.up), offsets=torch.zeros_like(compensation.offsets))


def curvatures_of(path: TokenPath, judged: Judged) -> tuple[Tensor, ...]:
    last = path.decided(path.states[-1])
    return torch.autograd.grad(last, path.states[1:], judged.curvature, retain_graph=True)


def test_the_mean_label_is_what_the_whole_text_loses_if_one_token_skips_one_layer(
    tiny_folder: Path, sequences: list[list[int]], compensation: LowRank
) -> None:
    config, stored = load_model_config(tiny_folder), open_weights(tiny_folder)
    # A layer that changes little, so that labels hold to second order.
    small = ("model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight")
    weights = {name: stored[name] * (0.1 if name in small else 1) for name in stored}
    decoder = DenseDecoder(config, weights, dtype=torch.float32)
    nothing = nothing_added(compensation)
    pinned = dict.fromkeys((0, 1, 3, 4, 5), Action.FULL)
    spec = replace(some_spec((Action.SKIP, Action.FULL)), pinned=pinned)
    token_ids, rates = torch.tensor(sequences[:2]), torch.tensor([0.0, 0, 0, 0, 1]).expand(6, len(Action))
    full = decided_rows(decoder.full_states(token_ids)[-1], PROMPT)
    path = run_path(decoder, token_ids, PROMPT, spec, nothing, random_choice(rates))
    last, generator = path.decided(path.states[-1]), torch.Generator().manual_seed(0)
    draws = []
    for _ in range(200):
        curvatures = curvatures_of(path, judge(decoder, full, last, generator))
        draws.append(
            measure_labels(decoder, spec, nothing, path, curvatures, torch.zeros(len(last)), [Action.FULL] * 6)
        )
    means = torch.stack([own.damage for own in draws]).mean(0)
    measured = torch.empty(len(last))
    for row in range(len(last)):
        actions = path.actions.clone()
        actions[2, row // (LENGTH - PROMPT), PROMPT + row % (LENGTH - PROMPT)] = int(Action.SKIP)
        after = decided_rows(rerun(decoder, token_ids, actions, nothing), PROMPT)
        measured[row] = divergences(decoder, full, after).sum()
    assert (draws[0].action == 0).all()
    assert (means - measured).norm() < 0.2 * measured.norm()


def rerun(decoder: DenseDecoder, token_ids: Tensor, actions: Tensor, compensation: LowRank) -> Tensor:
    hidden = decoder.embed(token_ids)
    with torch.no_grad():
        for layer, own in enumerate(actions):
            hidden = decoder.run_layer(layer, own, hidden, compensation)
    return hidden


def test_every_token_is_labelled_with_a_skip_and_one_kernel_in_each_layer(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank
) -> None:
    spec, token_ids = some_spec(), torch.tensor(sequences[:2])
    full = decided_rows(decoder.full_states(token_ids)[-1], PROMPT)
    path = run_path(
        decoder, token_ids, PROMPT, spec, compensation, random_choice(torch.full((6, len(Action)), 1 / len(Action)))
    )
    last = path.decided(path.states[-1])
    curvatures = curvatures_of(path, judge(decoder, full, last, torch.Generator()))
    kernels = [Action.FULL, Action.INT4, Action.FULL, Action.INT8, Action.FULL, Action.FULL]
    labels = measure_labels(decoder, spec, compensation, path, curvatures, torch.zeros(len(last)), kernels)
    means = []
    for block, layer in enumerate(spec.free_layers):
        wanted = {action for action in (Action.SKIP, kernels[layer]) if action is not Action.FULL}
        for action in wanted:
            mine = (labels.block == block) & (labels.action == spec.actions.index(action))
            assert int(mine.sum()) == len(last)
            means.append((action, float(labels.damage[mine].mean())))
        assert int((labels.block == block).sum()) == len(wanted) * len(last)
    skips, kernels_damage = ([own for action, own in means if (action is Action.SKIP) == is_skip] for is_skip in (1, 0))
    assert min(skips) > max(kernels_damage) > 0


def test_a_path_decides_as_its_network_does(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank
) -> None:
    spec = some_spec((Action.SKIP, Action.FULL))
    network = some_network(spec, decoder.config.hidden_size)
    choose = greedy_choice(spec, network, torch.tensor(0.0))
    path = run_path(decoder, torch.tensor(sequences[:2]), PROMPT, spec, compensation, choose)
    assert (path.actions[[0, 5]] == int(Action.FULL)).all()
    assert len(path.observations) == len(spec.decision_blocks)
    assert path.observations[1].last_actions.equal(path.decided(path.actions[1]))
    assert (path.actions[:, :, :PROMPT] == int(Action.FULL)).all()


def some_network(spec: PlanSpec, hidden_size: int, seed: int = 0) -> PolicyNetwork:
    generator = torch.Generator().manual_seed(seed)
    shapes = PolicyNetwork.shapes(len(spec.decision_blocks), 1, len(spec.actions), hidden_size, len(Action), 16, 8)
    return PolicyNetwork(*(torch.randn(shape, generator=generator) * 0.3 for shape in shapes.values()))


def labels_of(damage: Tensor, hidden: Tensor) -> Labels:
    count = len(damage)
    nothing = torch.zeros(count, dtype=torch.int64)
    return Labels(nothing, nothing, hidden.bfloat16(), torch.zeros(count, len(Action) + 3), nothing, damage)


def fitted(labels: Labels, settings: FitSettings, batches: int = 1) -> PolicyNetwork:
    spec = some_spec((Action.SKIP, Action.FULL))
    torch.manual_seed(0)
    fit, generator = DamageFit(DamageModel(spec, labels.hidden.shape[1], settings), settings), torch.Generator()
    for batch in range(batches):
        fit.add(labels, 1 - batch / batches, generator)
    return fit.model.network()


def test_a_fitted_network_predicts_the_mean_of_skewed_damages() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20_000, 32, generator=generator)
    mean = torch.where(hidden[:, 0] > 0, 0.2, 0.01)
    # Most tokens lose nothing, a few lose three times the mean.
    damage = mean / 0.3 * (torch.rand(20_000, generator=generator) < 0.3)
    settings = FitSettings(32, 16, steps=60, rows_per_step=2048, learning_rate=2e-3)
    network = fitted(labels_of(damage, hidden), settings, batches=10)
    test = torch.randn(1000, 32, generator=generator)
    predicted = network.log_damages(0, test, torch.zeros(1000, len(Action) + 3))[:, 0].exp()
    assert float(predicted[test[:, 0] > 0.3, 0].mean()) == pytest.approx(0.2, rel=0.25)
    assert float(predicted[test[:, 0] < -0.3, 0].mean()) == pytest.approx(0.01, rel=0.8)
    assert (predicted[:, 1] < 1e-6).all()  # FULL is what the others are measured by


@pytest.mark.parametrize("tail", [0.2, math.inf])
def test_the_slope_of_harm_is_its_derivative_and_stays_where_harm_is_cut(tail: float) -> None:
    damage = torch.tensor([0.0, 0.01, 0.4, 2.9], requires_grad=True)
    harm(damage, tail).sum().backward()
    torch.testing.assert_close(harm_slope(damage.detach(), tail), damage.grad)
    largest = harm_slope(torch.tensor([3.0]), tail)
    assert harm_slope(torch.tensor([50.0]), tail).equal(largest)


def test_with_a_tail_few_large_damages_count_more_than_many_small_ones_of_the_same_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20_000, 32, generator=generator)
    is_rare = torch.rand(20_000, generator=generator) < 0.05
    damage = torch.where(hidden[:, 0] > 0, is_rare * 1.0, 0.05)
    test = torch.randn(1000, 32, generator=generator)
    settings = FitSettings(32, 16, steps=30, rows_per_step=1024, learning_rate=4e-3, tail=0.2)
    network = fitted(labels_of(damage, hidden), settings, batches=10)
    predicted = network.log_damages(0, test, torch.zeros(1000, len(Action) + 3))[:, 0, 0].exp()
    ratio = float(predicted[test[:, 0] > 0.3].mean() / predicted[test[:, 0] < -0.3].mean())
    assert ratio == pytest.approx((1 + 1 / 0.2) / (1 + 0.05 / 0.2), rel=0.4)


def test_damages_that_are_no_numbers_stop_the_fit() -> None:
    labels = labels_of(torch.full((64,), torch.nan), torch.randn(64, 32))
    with pytest.raises(TrainingDiverged, match="not a number"):
        fitted(labels, FitSettings(8, 8))


class Progress:
    """Keeps what it is told, and calls back at each batch."""

    def __init__(self, at_batch: object = None) -> None:
        self.batches: list[int] = []
        self.rounds: list[list[Reached]] = []
        self._at_batch = at_batch

    def batch(self, done: int, num_labels: int) -> None:
        self.batches.append(done)
        if callable(self._at_batch):
            self._at_batch(done)

    def round(self, number: int, num_labels: int, reached: Sequence[Reached]) -> None:
        self.rounds.append(list(reached))


def trainer(
    decoder: DenseDecoder,
    sequences: list[list[int]],
    start: LowRank,
    progress: Progress | None = None,
    settings: TrainSettings = QUICK,
    actions: tuple[Action, ...] = tuple(Action),
) -> Trainer:
    return Trainer(some_spec(actions), decoder, sequences[4:], sequences[:4], start, settings, progress or Progress())


def test_a_stopped_run_ends_as_one_that_was_not_stopped(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 4:
            raise Stop

    whole = trainer(decoder, sequences, compensation).run(tmp_path / "whole.safetensors")
    with pytest.raises(Stop):
        trainer(decoder, sequences, compensation, Progress(stop)).run(tmp_path / "stopped.safetensors")
    assert num_rounds_done(tmp_path / "stopped.safetensors") == 1
    progress = Progress()
    resumed = trainer(decoder, sequences, compensation, progress).run(tmp_path / "stopped.safetensors")
    assert progress.batches == [3, 4, 5, 6]
    for name in PolicyNetwork.__slots__:
        assert torch.equal(getattr(whole.network, name), getattr(resumed.network, name)), name
    assert torch.equal(whole.compensation.down, resumed.compensation.down)
    assert all(len(reached) == 3 for reached in progress.rounds)


def test_training_skips_a_layer_that_does_nothing_before_any_other(
    tiny_folder: Path, sequences: list[list[int]], compensation: LowRank, tmp_path: Path
) -> None:
    config, stored = load_model_config(tiny_folder), open_weights(tiny_folder)
    idle = ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight")
    weights = {name: torch.zeros_like(stored[name]) if name in idle else stored[name] for name in stored}
    decoder = DenseDecoder(config, weights, dtype=torch.float32)
    nothing = nothing_added(compensation)
    fit = FitSettings(16, 8, steps=10, rows_per_step=256, learning_rate=5e-3)
    settings = replace(QUICK, rounds=2, batches=10, fit=fit)
    actions = (Action.SKIP, Action.FULL)
    run = trainer(decoder, sequences, nothing, settings=settings, actions=actions)
    trained = run.run(tmp_path / "c.safetensors")
    spec, token_ids = some_spec(actions), torch.tensor(sequences[:4])
    log_price = torch.tensor(-3.0)
    choose = greedy_choice(spec, trained.network, log_price)
    path = run_path(decoder, token_ids, PROMPT, spec, nothing, choose)
    damages = [
        trained.network.log_damages(
            block, own.hidden, facts_of(own.last_actions, own.cost_spent, log_price.expand(64), len(Action))
        )
        for block, own in enumerate(path.observations)
    ]
    means = torch.stack([own[:, 0, 0].exp().mean() for own in damages])
    assert spec.free_layers[int(means.argmin())] == 3
    assert means.min() < 0.5 * means.sort().values[1]


def test_dear_prices_teach_the_compensation_no_more_than_cheap_ones() -> None:
    prices = torch.tensor([0.5, 0.5, 1.0, 4.0])
    weights = price_weights(prices.log())
    divergences = prices**1.5
    assert float(weights.mean()) == pytest.approx(1)
    assert torch.allclose(weights * divergences, (weights * divergences).mean().expand(4))


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_refused_by_name(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank, tmp_path: Path
) -> None:
    path, short = tmp_path / "checkpoint.safetensors", replace(QUICK, rounds=1)
    trainer(decoder, sequences, compensation, settings=short).run(path)
    with pytest.raises(PolicyFileError, match=r"checkpoint\.safetensors.*another run"):
        trainer(decoder, sequences, compensation, settings=replace(short, seed=1)).run(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(PolicyFileError, match=r"checkpoint\.safetensors"):
        trainer(decoder, sequences, compensation, settings=short).run(path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "checkpoint.safetensors"

    def take_the_folder_away(done: int) -> None:
        if done == 3:
            folder.rename(tmp_path / "moved")

    with pytest.raises(PolicyFileError, match="cannot be written"):
        trainer(decoder, sequences, compensation, Progress(take_the_folder_away)).run(path)
    (tmp_path / "moved").rename(folder)
    assert num_rounds_done(path) == 1
    assert [file.name for file in folder.iterdir()] == [path.name]
