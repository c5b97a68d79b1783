"""Compensation is trained for the paths that it runs on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.layers.compensation import LowRank
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.choices import no_choice
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.loss import TrainingDiverged, divergences
from dash_runtime.training.paths import decided_rows, run_path
from dash_runtime.training.trained_compensation import CompensationTraining, refit_plan
from tests.runtime.support import some_costs
from tests.tiny_models import VOCAB_SIZE

LENGTH, PROMPT, RANK = 24, 4, 8
PLAN = [Action.FULL, Action.SKIP, Action.FULL, Action.SKIP, Action.FULL, Action.FULL]
SPEC = PlanSpec.fixed(PLAN, Action.FULL, some_costs())


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> DenseDecoder:
    return DenseDecoder(load_model_config(tiny_folder), open_weights(tiny_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return torch.randint(VOCAB_SIZE, (200, LENGTH), generator=torch.Generator().manual_seed(8)).tolist()


def fresh(decoder: DenseDecoder) -> LowRank:
    """A compensation that does nothing yet."""
    layers, size = decoder.num_layers, decoder.config.hidden_size
    down = torch.randn(layers, RANK, size, generator=torch.Generator().manual_seed(1)) * size**-0.5
    return LowRank(down, torch.zeros(layers, size, RANK), torch.zeros(layers, size))


def divergence(decoder: DenseDecoder, compensation: LowRank, sequences: list[list[int]]) -> float:
    token_ids = torch.tensor(sequences)
    full = decided_rows(decoder.full_states(token_ids)[-1], PROMPT)
    with torch.no_grad():
        path = run_path(decoder, token_ids, PROMPT, SPEC, compensation, no_choice)
    return float(divergences(decoder, full, path.decided(path.states[-1])).mean())


def test_training_lowers_the_divergence_of_a_plan_on_other_text(
    decoder: DenseDecoder, sequences: list[list[int]]
) -> None:
    start = fresh(decoder)
    trained = refit_plan(decoder, SPEC, start, sequences[8:], 100, PROMPT, rate=30)
    assert divergence(decoder, trained, sequences[:8]) < 0.97 * divergence(decoder, start, sequences[:8])


def test_layers_that_run_keep_their_compensation(decoder: DenseDecoder, sequences: list[list[int]]) -> None:
    start = fresh(decoder)
    trained = refit_plan(decoder, SPEC, start, sequences, 2, PROMPT)
    moved = (trained.up != start.up).flatten(1).any(1).tolist()
    assert moved == [action is Action.SKIP for action in PLAN]


def test_a_gradient_that_is_not_a_number_stops_the_training(decoder: DenseDecoder, sequences: list[list[int]]) -> None:
    start = fresh(decoder)
    training = CompensationTraining(decoder, start, torch.tensor(sequences[:2]))
    outputs = training.trained.compensation()(1, torch.ones(3, decoder.config.hidden_size))
    with pytest.raises(TrainingDiverged, match="compensation"):
        training.step(outputs, torch.full_like(outputs, torch.nan), 1.0)
    broken = replace(start, offsets=torch.full_like(start.offsets, torch.nan))
    with pytest.raises(TrainingDiverged):
        refit_plan(decoder, SPEC, broken, sequences, 1, PROMPT)
