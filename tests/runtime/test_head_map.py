"""The map of a narrow head fits the states that a model's head gets."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.layers.narrow_head import HeadMap, NarrowMatrices
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.head_map import fit_head_map


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> DenseDecoder:
    return DenseDecoder(load_model_config(tiny_folder), open_weights(tiny_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def sequences(decoder: DenseDecoder) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    shape = 12, 40
    return torch.randint(decoder.config.vocab_size, shape, generator=generator).tolist()  # type: ignore[no-any-return]


def rough_logits(decoder: DenseDecoder, states: Tensor, own: HeadMap) -> Tensor:
    matrices = NarrowMatrices.of(decoder.head, own.widen)
    return matrices.widened(states @ own.narrow.T) + (states @ matrices.mean).unsqueeze(1)


@torch.no_grad()
def test_its_logits_are_nearer_than_those_of_other_directions_on_other_text(
    decoder: DenseDecoder, sequences: list[list[int]]
) -> None:
    own = fit_head_map(decoder, sequences[:8], 4)
    size = decoder.config.hidden_size
    assert own.narrow.shape == (own.rank, size)
    assert size / 5 < own.rank < size / 2
    assert own.offsets.shape == (decoder.config.vocab_size,)
    states = decoder.final_norm(decoder.full_states(torch.tensor(sequences[8:]))[-1][:, 4:]).flatten(0, 1)
    exact = states @ decoder.head.T

    def error(of: HeadMap) -> Tensor:
        return (rough_logits(decoder, states, of) - exact).square().mean()

    basis = torch.linalg.qr(torch.randn(size, own.rank, generator=torch.Generator().manual_seed(2))).Q
    assert error(own) < 0.8 * error(HeadMap(basis.T, basis, own.offsets))
    lacking = (exact - rough_logits(decoder, states, own)).var(dim=0)
    assert 0.5 < float((2 * own.offsets).mean() / lacking.mean()) < 2


def test_fitting_changes_nothing_of_the_model(decoder: DenseDecoder, sequences: list[list[int]]) -> None:
    before = decoder.head.clone()
    fit_head_map(decoder, sequences[:4], 4)
    assert torch.equal(decoder.head, before)
