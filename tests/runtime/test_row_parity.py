"""Calls for several rows are used only if each row has the same numbers as alone, on the machine at hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.inductor import InductorBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.programs.program_cache import ProgramKind, ProgramSpec
from dash_runtime.programs.traced_layer import ModelShape
from dash_runtime.startup.row_parity import unequal_counts
from tests.runtime.support import load_decoder


class RoundingDecoder:
    """A decoder whose first layer changes nothing, except one row in a hundred in calls of four rows."""

    context_length = 512

    def __init__(self, real: Decoder) -> None:
        self.config = real.config
        self.caches = real.caches

    def batch(self, *arguments: Any, **options: Any) -> "RoundingDecoder":
        return self

    def commit(self) -> None:
        pass

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[float(token_id)] for token_id in token_ids])

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.where(hidden % 100 == 0, hidden + 1, hidden) if len(actions) == 4 else hidden


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


def test_a_call_that_rounds_otherwise_now_and_then_is_noticed(decoder: Decoder) -> None:
    assert unequal_counts(RoundingDecoder(decoder), (8, 4, 1)) == {4}  # type: ignore[arg-type]


def test_calls_that_were_dropped_are_not_made(decoder: Decoder) -> None:
    shape = ModelShape.of(decoder.config)
    programs = {ProgramSpec(ProgramKind.LAYER, Action.FULL, shape, 1, rows): lambda _: [] for rows in (1, 4, 8)}
    layers = InductorBackend(decoder.config, programs, shares_products=False)  # type: ignore[arg-type]
    assert layers._calls(13, takes_several=True) == [8, 4, 1]
    assert [layers.rows_to_verify(rows) for rows in range(1, 18)] == [
        1, 4, 4, 4, 8, 8, 8, 8, 9, 12, 12, 12, 16, 16, 16, 16, 17,
    ]  # fmt: skip
    layers.drop_verified_rows({8})
    assert [layers.rows_to_verify(rows) for rows in range(1, 9)] == [1, 4, 4, 4, 5, 8, 8, 8]
    assert layers._calls(13, takes_several=True) == [4, 4, 4, 1]
    layers.drop_verified_rows({1, 4})
    assert layers.verified_rows == (1,)
