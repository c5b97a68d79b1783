"""The INT4 head has the exact head's logits for the likeliest tokens, and rough ones for the rest."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.shortlist import NUM_EXACT_TILES, int4_logits, shortlist_head
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.grouped_matrix import is_packable, quantize_grouped, quantize_int4_with_rest
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.head_struct import RoughMatrix
from dash_runtime.native.matrix import pack_native_matrix, pack_rough_matrix
from dash_runtime.native.model import HeadRows, NativeModel
from tests.runtime.native_code import native_library

pytestmark = pytest.mark.usefixtures("each_level")

VOCABULARY, SIZE, NUM_EXACT = 816, 96, 5
"""51 tiles, which no vector and no number of threads divides."""


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> ModelConfig:
    return replace(load_model_config(tiny_folder), hidden_size=SIZE)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture(scope="module")
def loudest() -> Tensor:
    return torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))[:32]


def some_rows(num_rows: int, loudest: Tensor) -> Tensor:
    rows = torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(3))
    rows[:, loudest] *= 8
    return rows.bfloat16()


def head(
    config: ModelConfig, weight: Tensor, loudest: Tensor, num_exact: int, exact: Action = Action.FULL, threads: int = 1
) -> HeadRows:
    model = NativeModel(native_library(), config, [0] * config.num_layers, threads)
    rough = RoughMatrix(pack_rough_matrix(FullLinear(weight), loudest), loudest, num_exact)
    return HeadRows(model, pack_native_matrix(exact, FullLinear(weight)), torch.ones(SIZE), len(weight), 1.0, rough)


def exact_head(config: ModelConfig, weight: Tensor, exact: Action = Action.FULL) -> HeadRows:
    model = NativeModel(native_library(), config, [0] * config.num_layers, 1)
    return HeadRows(model, pack_native_matrix(exact, FullLinear(weight)), torch.ones(SIZE), len(weight), 1.0)


@pytest.mark.parametrize("exact", [Action.INT8, Action.FULL])
@pytest.mark.parametrize("num_rows", [1, 3, 11])
def test_the_tiles_with_the_largest_logits_have_the_exact_heads_bits_and_no_others(
    config: ModelConfig, weight: Tensor, loudest: Tensor, exact: Action, num_rows: int
) -> None:
    rows = some_rows(num_rows, loudest)
    rough = head(config, weight, loudest, 0, exact)(rows).unflatten(1, (-1, 16))
    mixed = head(config, weight, loudest, NUM_EXACT, exact, threads=2)(rows).unflatten(1, (-1, 16))
    fine = exact_head(config, weight, exact)(rows).unflatten(1, (-1, 16))
    chosen = rough.amax(-1).topk(NUM_EXACT).indices
    expected = rough.clone()
    for row, tiles in enumerate(chosen):
        expected[row, tiles] = fine[row, tiles]
    assert torch.equal(mixed, expected)
    assert not torch.equal(rough, expected)


def test_a_row_has_the_same_bits_among_any_number_of_others_with_any_number_of_threads(
    config: ModelConfig, weight: Tensor, loudest: Tensor
) -> None:
    rows = some_rows(17, loudest)
    alone = torch.cat([head(config, weight, loudest, NUM_EXACT)(row) for row in rows.split(1)])
    for threads in (1, 2, 5):
        own = head(config, weight, loudest, NUM_EXACT, threads=threads)
        for num_rows in range(1, 18):
            assert torch.equal(own(rows[:num_rows]), alone[:num_rows]), (num_rows, threads)


@pytest.mark.parametrize("num_exact", [1, NUM_EXACT, 51, 64])
def test_as_many_tiles_as_asked_for_are_exact_if_all_are_equal(
    config: ModelConfig, loudest: Tensor, num_exact: int
) -> None:
    weight = torch.rand(1, SIZE, generator=torch.Generator().manual_seed(4)).bfloat16().expand(VOCABULARY, -1)
    rows = some_rows(2, loudest)
    rough, mixed = (head(config, weight, loudest, count)(rows) for count in (0, num_exact))
    differs = (rough != mixed).unflatten(1, (-1, 16)).any(-1)
    first = min(num_exact, 51)
    assert differs[:, :first].all()
    assert not differs[:, first:].any()


def test_with_negative_logits_alone_the_largest_are_exact_too(
    config: ModelConfig, weight: Tensor, loudest: Tensor
) -> None:
    rows = torch.ones(1, SIZE).bfloat16()
    low = (weight.float() - 4).bfloat16()
    likeliest = exact_head(config, low)(rows).argmax()
    assert (exact_head(config, low)(rows) < 0).all()
    mixed = head(config, low, loudest, NUM_EXACT)(rows)
    assert mixed[0, likeliest] == exact_head(config, low)(rows)[0, likeliest]


def test_logits_of_what_is_no_number_are_none_and_its_neighbours_stay(
    config: ModelConfig, weight: Tensor, loudest: Tensor
) -> None:
    rows = some_rows(9, loudest)
    expected = head(config, weight, loudest, NUM_EXACT)(rows)
    rows[4, 41] = float("nan")
    logits = head(config, weight, loudest, NUM_EXACT, threads=2)(rows)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(logits[others], expected[others])
    assert logits[4].isnan().all()


def test_repeated_inputs_make_the_rounding_of_their_weights_small(weight: Tensor, loudest: Tensor) -> None:
    once, matrix = quantize_grouped(weight, 4).dequantized(), quantize_int4_with_rest(weight, loudest)
    twice = matrix.dequantized()
    assert torch.equal(twice[:, :SIZE], once)
    error = (weight.float() - once)[:, loudest]
    left = error - twice[:, SIZE:]
    assert left.abs().max() < error.abs().max() / 8


def test_many_rows_have_nearly_the_logits_that_native_code_computes(
    config: ModelConfig, weight: Tensor, loudest: Tensor
) -> None:
    rows, norm = some_rows(40, loudest), RmsNorm(torch.ones(SIZE).bfloat16(), config.rms_norm_eps)
    native = head(config, weight, loudest, NUM_EXACT_TILES)(rows)
    eager = shortlist_head(int4_logits(weight, loudest), FullLinear(weight), norm, 1.0)(rows)
    full = exact_head(config, weight)(rows)
    assert is_packable(*weight.shape)
    spread = full.std()
    assert (eager - native).abs().mean() < 0.02 * spread
    assert (eager.argmax(-1) == full.argmax(-1)).float().mean() > 0.9
