"""Labels are what brute force measures, networks fit them, and a training run can be stopped."""

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
from dash_runtime.training.damage_model import FitSettings, fit_damages
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.labels import Labeller, Labels, SpoiltContext
from dash_runtime.training.loss import Loss, Objective, TrainingDiverged
from dash_runtime.training.paths import change_layer, run_path
from dash_runtime.training.train import Reached, Trainer, TrainSettings
from tests.runtime.support import load_decoder, some_costs, some_low_rank
from tests.tiny_models import VOCAB_SIZE

LENGTH, PROMPT = 20, 4
QUICK = TrainSettings(
    rounds=3, batches=2, sequences=4, changes=3, distill_steps=2, num_prompt_tokens=PROMPT, fit=FitSettings(16, 8)
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


def some_labeller(decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank) -> Labeller:
    """A labeller along random paths."""
    spec = some_spec()
    text = decoder.text(torch.tensor(sequences[:2]), PROMPT)
    path = run_path(decoder, text, spec, compensation, random_choice(torch.full((6, 4), 0.25)))
    prices = torch.zeros(text.token_ids.numel())
    facts = [facts_of(own.last_actions, own.cost_spent, prices, len(Action)) for own in path.observations]
    loss = Loss(decoder, text.full, Objective.DIVERGENCE)
    return Labeller(decoder, text, spec, compensation, path, facts, loss)


@pytest.mark.parametrize("action", [Action.SKIP, Action.INT4])
def test_a_label_is_the_change_of_a_tokens_loss_if_it_alone_changes_one_layer(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank, action: Action
) -> None:
    labeller = some_labeller(decoder, sequences, compensation)
    own, layer = labeller.path.actions[2], 2
    others = labeller.others(layer, action)
    labels, change = labeller.measure(layer, others)
    for place in ((0, 3), (1, 9), (1, 15)):
        alone = own.clone()
        alone[place] = others[place]
        arguments = (decoder, labeller.text, labeller.spec, compensation, labeller.path, layer, alone)
        difference = labeller.loss(change_layer(*arguments, False)) - labeller.own_loss
        assert float(change[place]) == pytest.approx(float(difference[place]), abs=1e-5)
    assert len(labels.damage) == int((own != others).sum())
    assert (labels.coarse < labels.precise).all()
    signs = torch.where(others < own, 1, -1)[own != others]
    torch.testing.assert_close(labels.damage, change[own != others] * signs)


def test_a_skipping_token_is_labelled_by_the_cheapest_kernel(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank
) -> None:
    labeller = some_labeller(decoder, sequences, compensation)
    others = labeller.others(3, Action.SKIP)
    is_skipping = labeller.path.actions[3] == int(Action.SKIP)
    assert (others[is_skipping] == int(Action.INT4)).all()
    assert (others[~is_skipping] == int(Action.SKIP)).all()


def test_spoilt_context_counts_what_later_tokens_lose(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank
) -> None:
    labeller = some_labeller(decoder, sequences, compensation)
    spoilt = SpoiltContext.nothing(6)
    assert spoilt.factors().equal(torch.ones(6))
    others = labeller.others(2, Action.SKIP)
    _, change = labeller.measure(2, others)
    labeller.add_spoilt(spoilt, 2, others, change, torch.Generator().manual_seed(0))
    assert spoilt.own[2] != 0
    assert spoilt.total[2] != spoilt.own[2]
    assert (spoilt.own[[0, 1, 3, 4, 5]] == 0).all()


def test_a_path_decides_as_its_network_does(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank
) -> None:
    spec = some_spec((Action.SKIP, Action.FULL))
    text = decoder.text(torch.tensor(sequences[:2]), PROMPT)
    network = some_network(spec, decoder.config.hidden_size)
    path = run_path(decoder, text, spec, compensation, greedy_choice(spec, network, torch.tensor(0.0)))
    assert (path.actions[[0, 5]] == int(Action.FULL)).all()
    assert len(path.observations) == len(spec.decision_blocks)
    assert path.observations[1].last_actions.equal(path.actions[1].flatten())


def some_network(spec: PlanSpec, hidden_size: int, seed: int = 0) -> PolicyNetwork:
    generator = torch.Generator().manual_seed(seed)
    shapes = PolicyNetwork.shapes(len(spec.decision_blocks), 1, len(spec.actions), hidden_size, len(Action), 16, 8)
    return PolicyNetwork(*(torch.randn(shape, generator=generator) * 0.3 for shape in shapes.values()))


def labels_of(damage: Tensor, hidden: Tensor) -> Labels:
    count = len(damage)
    nothing = torch.zeros(count, dtype=torch.int64)
    return Labels(nothing, nothing, hidden.bfloat16(), torch.zeros(count, 7), nothing, nothing + 1, damage)


def test_a_fitted_network_predicts_the_mean_of_skewed_damages() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20_000, 32, generator=generator)
    mean = torch.where(hidden[:, 0] > 0, 0.2, 0.01)
    # Most tokens lose nothing, a few lose ten times the mean.
    damage = 10 * mean * (torch.rand(20_000, generator=generator) < 0.1)
    spec = some_spec((Action.SKIP, Action.FULL))
    settings = FitSettings(32, 16, epochs=30, rows_per_step=512, dropout=0.0)
    network = fit_damages(spec, labels_of(damage, hidden), settings, 0).network(torch.ones(4, 1))
    test = torch.randn(1000, 32, generator=generator)
    predicted = network.log_damages(0, test, torch.zeros(1000, 7))[:, 0].exp()
    assert float(predicted[test[:, 0] > 0.3, 0].mean()) == pytest.approx(0.2, rel=0.25)
    assert float(predicted[test[:, 0] < -0.3, 0].mean()) == pytest.approx(0.01, rel=0.5)
    assert (predicted[:, 1] < 1e-6).all()  # FULL is what the others are measured by


def test_a_layers_factor_multiplies_its_damages() -> None:
    spec = some_spec((Action.SKIP, Action.FULL))
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    model = fit_damages(spec, labels_of(torch.full((64,), 0.1), hidden), FitSettings(8, 8), 0)
    factors = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    plain, multiplied = model.network(torch.ones(4, 1)), model.network(factors)
    facts = torch.zeros(64, 7)
    for block in range(4):
        ratio = (multiplied.log_damages(block, hidden, facts) - plain.log_damages(block, hidden, facts)).exp()
        torch.testing.assert_close(ratio[..., 0], torch.full((64, 1), float(factors[block])))


def test_damages_that_are_no_numbers_stop_the_fit() -> None:
    labels = labels_of(torch.full((64,), torch.nan), torch.randn(64, 32))
    with pytest.raises(TrainingDiverged, match="not a number"):
        fit_damages(some_spec((Action.SKIP, Action.FULL)), labels, FitSettings(8, 8), 0)


class Progress:
    """Keeps what it is told, and calls back at each batch."""

    def __init__(self, at_batch: object = None) -> None:
        self.batches: list[int] = []
        self.rounds: list[list[Reached]] = []
        self._at_batch = at_batch

    def note(self, text: str) -> None: ...

    def batch(self, done: int, num_labels: int) -> None:
        self.batches.append(done)
        if callable(self._at_batch):
            self._at_batch(done)

    def round(self, number: int, num_labels: int, reached: Sequence[Reached]) -> None:
        self.rounds.append(list(reached))


def trainer(
    decoder: DenseDecoder,
    sequences: list[list[int]],
    progress: Progress | None = None,
    settings: TrainSettings = QUICK,
    actions: tuple[Action, ...] = tuple(Action),
) -> Trainer:
    return Trainer(some_spec(actions), decoder, sequences[4:], sequences[:4], settings, progress or Progress())


def test_a_stopped_run_ends_as_one_that_was_not_stopped(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 4:
            raise Stop

    whole = trainer(decoder, sequences).run(compensation, tmp_path / "whole.safetensors")
    with pytest.raises(Stop):
        trainer(decoder, sequences, Progress(stop)).run(compensation, tmp_path / "stopped.safetensors")
    assert num_rounds_done(tmp_path / "stopped.safetensors") == 1
    progress = Progress()
    resumed = trainer(decoder, sequences, progress).run(compensation, tmp_path / "stopped.safetensors")
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
    nothing = replace(
        compensation, up=torch.zeros_like(compensation.up), offsets=torch.zeros_like(compensation.offsets)
    )
    settings = replace(
        QUICK, rounds=2, changes=4, distill_steps=0, fit=FitSettings(16, 8, epochs=60, rows_per_step=256, dropout=0.0)
    )
    actions = (Action.SKIP, Action.FULL)
    trained = trainer(decoder, sequences, settings=settings, actions=actions).run(nothing, tmp_path / "c.safetensors")
    text, spec = decoder.text(torch.tensor(sequences[:4]), PROMPT), some_spec(actions)
    log_price = torch.tensor(-3.0)
    path = run_path(decoder, text, spec, nothing, greedy_choice(spec, trained.network, log_price))
    damages = [
        trained.network.log_damages(
            block, own.hidden, facts_of(own.last_actions, own.cost_spent, log_price.expand(64), 4)
        )
        for block, own in enumerate(path.observations)
    ]
    means = torch.stack([own[:, 0, 0].exp().mean() for own in damages])
    assert spec.free_layers[int(means.argmin())] == 3
    assert means.min() < 0.5 * means.sort().values[1]


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_refused_by_name(
    decoder: DenseDecoder, sequences: list[list[int]], compensation: LowRank, tmp_path: Path
) -> None:
    path, short = tmp_path / "checkpoint.safetensors", replace(QUICK, rounds=1)
    trainer(decoder, sequences, settings=short).run(compensation, path)
    with pytest.raises(PolicyFileError, match=r"checkpoint\.safetensors.*another run"):
        trainer(decoder, sequences, settings=replace(short, seed=1)).run(compensation, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(PolicyFileError, match=r"checkpoint\.safetensors"):
        trainer(decoder, sequences, settings=short).run(compensation, path)


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
        trainer(decoder, sequences, Progress(take_the_folder_away)).run(compensation, path)
    (tmp_path / "moved").rename(folder)
    assert num_rounds_done(path) == 1
    assert [file.name for file in folder.iterdir()] == [path.name]
