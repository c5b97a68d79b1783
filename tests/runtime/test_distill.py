"""Distillation lowers the divergence under the skips that it is trained for, and runs repeat."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import LowRank
from dash_runtime.training.dense_decoder import Compensate, DenseDecoder, Text
from dash_runtime.training.distill import DistillSettings, distill_compensation, path_divergence
from dash_runtime.training.loss import TrainingDiverged
from tests.tiny_models import VOCAB_SIZE

LENGTH, PROMPT, RANK = 24, 4, 8
SKIPPED_LAYERS = [2, 4]
SETTINGS = DistillSettings(steps=100, sequences_per_step=8, learning_rate=1e-2, num_prompt_tokens=PROMPT)


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> DenseDecoder:
    return DenseDecoder(load_model_config(tiny_folder), open_weights(tiny_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return torch.randint(VOCAB_SIZE, (200, LENGTH), generator=torch.Generator().manual_seed(8)).tolist()


def fresh(decoder: DenseDecoder, size: float = 0.0) -> LowRank:
    """Returns a map with a random `down`, and `up` and offsets of the given size; with size 0 it is the identity."""
    generator = torch.Generator().manual_seed(3)
    num_layers, hidden_size = decoder.num_layers, decoder.config.hidden_size
    down = torch.randn(num_layers, RANK, hidden_size, generator=generator) * hidden_size**-0.5
    up = torch.randn(num_layers, hidden_size, RANK, generator=generator) * size
    return LowRank(down, up, torch.zeros(num_layers, hidden_size))


def always(text: Text, compensate: Compensate) -> Tensor:
    """Skips the same layers for every token."""
    actions = torch.full((6, *text.token_ids.shape), int(Action.FULL))
    actions[SKIPPED_LAYERS] = int(Action.SKIP)
    return actions


def ignore(*_: object) -> None:
    """Ignores progress."""


@torch.no_grad()
def mean_divergence(decoder: DenseDecoder, compensation: LowRank, batch: list[list[int]]) -> float:
    text = decoder.text(torch.tensor(batch), PROMPT)
    return float(path_divergence(decoder, text, always(text, compensation), compensation).mean())


def test_distillation_lowers_the_divergence_of_fixed_skips_on_other_text_too(
    decoder: DenseDecoder, sequences: list[list[int]]
) -> None:
    start, told = fresh(decoder), []
    trained = distill_compensation(
        decoder, start, sequences[4:], always, SETTINGS, lambda step, divergence: told.append((step, divergence))
    )
    assert [step for step, _ in told] == list(range(100))
    first, last = (sum(divergence for _, divergence in part) for part in (told[:5], told[-5:]))
    assert last < 0.9 * first
    assert mean_divergence(decoder, trained, sequences[:4]) < 0.95 * mean_divergence(decoder, start, sequences[:4])
    untouched = [layer for layer in range(6) if layer not in SKIPPED_LAYERS]
    torch.testing.assert_close(trained.up[untouched], start.up[untouched])
    torch.testing.assert_close(trained.down[untouched], start.down[untouched])


def test_a_few_sequences_are_learned_nearly_by_heart(decoder: DenseDecoder, sequences: list[list[int]]) -> None:
    few = sequences[:4]
    trained = distill_compensation(decoder, fresh(decoder), few, always, SETTINGS, ignore)
    assert mean_divergence(decoder, trained, few) < 0.4 * mean_divergence(decoder, fresh(decoder), few)


def test_the_same_seed_gives_the_same_compensation_and_another_seed_another(
    decoder: DenseDecoder, sequences: list[list[int]]
) -> None:
    short = replace(SETTINGS, steps=4)
    first, again, other = (
        distill_compensation(decoder, fresh(decoder), sequences, always, settings, ignore)
        for settings in (short, short, replace(short, seed=1))
    )
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, other.up)


def test_the_best_on_held_out_text_is_kept_so_that_it_never_gets_worse(
    decoder: DenseDecoder, sequences: list[list[int]]
) -> None:
    start = fresh(decoder)
    wild = replace(SETTINGS, steps=6, learning_rate=30.0, evaluate_every=2)
    ruined = distill_compensation(decoder, start, sequences[4:], always, wild, ignore)
    assert mean_divergence(decoder, ruined, sequences[:4]) > mean_divergence(decoder, start, sequences[:4])
    kept = distill_compensation(decoder, start, sequences[4:], always, wild, ignore, held_out=sequences[:4])
    assert mean_divergence(decoder, kept, sequences[:4]) <= mean_divergence(decoder, start, sequences[:4]) + 1e-5


def test_the_plan_of_each_batch_is_asked_for_and_the_result_is_in_float32(
    tiny_folder: Path, sequences: list[list[int]]
) -> None:
    decoder = DenseDecoder(load_model_config(tiny_folder), open_weights(tiny_folder), dtype=torch.bfloat16)
    asked: list[list[list[int]]] = []

    def nothing(text: Text, compensate: Compensate) -> Tensor:
        asked.append(text.token_ids.tolist())
        return torch.full((6, *text.token_ids.shape), int(Action.FULL))

    start = fresh(decoder, 0.1)
    trained = distill_compensation(decoder, start, sequences, nothing, replace(SETTINGS, steps=3), ignore)
    assert [len(batch) for batch in asked] == [8, 8, 8]
    decided = [ids[PROMPT:] for ids in sequences]
    assert all(ids in decided for batch in asked for ids in batch)
    assert {tensor.dtype for tensor in trained.tensors().values()} == {torch.float32}
    torch.testing.assert_close(trained.up.float(), start.up, atol=0, rtol=2**-7)  # nothing was skipped or learned


def test_what_is_not_a_number_stops_the_training(decoder: DenseDecoder, sequences: list[list[int]]) -> None:
    broken = replace(fresh(decoder), offsets=torch.full((6, decoder.config.hidden_size), torch.nan))
    with pytest.raises(TrainingDiverged, match="not a number"):
        distill_compensation(decoder, broken, sequences, always, SETTINGS, ignore)


def test_unusable_settings_and_answers_are_refused(decoder: DenseDecoder, sequences: list[list[int]]) -> None:
    for field, value in (("steps", 0), ("learning_rate", 0.0), ("warmup_share", 2.0), ("num_prompt_tokens", -1)):
        with pytest.raises(ConfigError, match=field):
            DistillSettings(**{field: value})
    with pytest.raises(ConfigError, match="num_prompt_tokens"):
        distill_compensation(
            decoder, fresh(decoder), sequences, always, replace(SETTINGS, num_prompt_tokens=LENGTH), ignore
        )

    def too_few_layers(text: Text, compensate: Compensate) -> Tensor:
        return always(text, compensate)[1:]

    with pytest.raises(ConfigError, match="actions_for"):
        distill_compensation(decoder, fresh(decoder), sequences, too_few_layers, SETTINGS, ignore)


def test_the_learning_rate_rises_and_then_falls() -> None:
    settings = DistillSettings(steps=100, learning_rate=1.0, warmup_share=0.1, final_rate_share=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[-1] == pytest.approx(0.109)
