"""The planner's table, measured on a tiny decoder."""

from pathlib import Path

import torch

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.compensation import Identity
from dash_runtime.startup.measure_latency import measure_latencies
from tests.runtime.support import load_decoder, some_affine
from tests.tiny_models import save_tiny_model


def measured(decoder: Decoder, rows: tuple[int, ...]) -> LatencyTable:
    return measure_latencies(decoder, Identity(), rows, rounds=2)


def test_every_action_takes_time_at_every_row_count(decoder: Decoder) -> None:
    costs = measure_latencies(decoder, some_affine(decoder), rounds=3)
    assert costs.rows == (1, 2, 4, 8, 16, 64)
    assert set(costs.seconds) == set(decoder.actions)
    assert all(0 < seconds < 1 for by_rows in costs.seconds.values() for seconds in by_rows)


def test_only_the_decoders_own_actions_are_measured(tiny_folder: Path) -> None:
    decoder = load_decoder(tiny_folder, actions=(Action.SKIP, Action.FULL))
    assert set(measured(decoder, (1, 3)).seconds) == {Action.SKIP, Action.FULL}


def test_a_model_with_a_short_context_and_many_layers_is_measured(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "short", "llama", max_position_embeddings=32, num_hidden_layers=11)
    decoder = load_decoder(folder, torch.bfloat16)
    assert all(seconds > 0 for by_rows in measured(decoder, (1, 2)).seconds.values() for seconds in by_rows)
