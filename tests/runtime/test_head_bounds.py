"""A head with bounds finds the token of the largest exact logit, whatever the rough logits say, and makes no others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.decoder.backends.native import NativeBackend
from dash_runtime.decoder.backends.packed_model import PackedModel, Part, pack_head
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.head_struct import HeadBounds
from dash_runtime.native.matrix import int8_errors, pack_native_matrix
from dash_runtime.native.model import HeadRows, NativeModel
from tests.runtime.native_code import native_library, rounded

pytestmark = pytest.mark.usefixtures("each_level")

VOCABULARY, SIZE = 4016, 96
"""251 tiles, which no number of threads divides."""
COUNTS = (1, 3, 8, 17, 40)


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> ModelConfig:
    return replace(load_model_config(tiny_folder), hidden_size=SIZE)


def near_ties() -> tuple[Tensor, Tensor]:
    """Returns a matrix whose rows are close to a few directions, closer than INT8 tells apart; and states along
    these."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(40, SIZE, generator=generator)
    noise = torch.randn(VOCABULARY, SIZE, generator=generator)
    weight = directions[torch.arange(VOCABULARY) % 40] + 0.01 * noise
    return weight.bfloat16(), (directions + 0.1 * noise[:40]).bfloat16()


def loud_channels() -> tuple[Tensor, Tensor]:
    """Returns a matrix and states some of whose channels are a hundred times as large, as in many models."""
    generator = torch.Generator().manual_seed(2)
    weight, states = (torch.randn(count, SIZE, generator=generator) for count in (VOCABULARY, 40))
    states[:, [5, 40, 41]] *= 100
    weight[:, 7] *= 50
    return weight.bfloat16(), states.bfloat16()


def equal_rows() -> tuple[Tensor, Tensor]:
    """Returns a matrix in which each row comes again and again, and states."""
    generator = torch.Generator().manual_seed(3)
    weight, states = (torch.randn(count, SIZE, generator=generator) for count in (50, 40))
    return weight[torch.randperm(VOCABULARY, generator=generator) % 50].bfloat16(), states.bfloat16()


def flat() -> tuple[Tensor, Tensor]:
    """Returns a matrix and states of zeros, of one number, and of numbers that are hardly any."""
    weight = torch.full((VOCABULARY, SIZE), 0.5)
    states = torch.stack([torch.full((SIZE,), value) for value in (0.0, 1.0, -1.0, 1e-30)])
    return weight.bfloat16(), states.repeat(10, 1).bfloat16()


def head_of(config: ModelConfig, weight: Tensor, threads: int, multiplier: float) -> tuple[NativeModel, HeadRows]:
    rows, full = NativeModel(native_library(), config, [0] * config.num_layers, threads), FullLinear(weight)
    bounds = HeadBounds(pack_native_matrix(Action.INT8, full), *int8_errors(full).tensors())
    matrix = pack_native_matrix(Action.FULL, full)
    return rows, HeadRows(rows, matrix, torch.ones(SIZE), len(weight), multiplier, bounds)


@pytest.mark.parametrize("multiplier", [1.0, 0.3])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("make", [near_ties, loud_channels, equal_rows, flat])
def test_the_token_is_the_first_of_the_largest_exact_logit(
    config: ModelConfig, make: Callable[[], tuple[Tensor, Tensor]], threads: int, multiplier: float
) -> None:
    weight, states = make()
    rows, head = head_of(config, weight, threads, multiplier)
    for count in COUNTS:
        chosen = rows.run_head(states[:count], head, wants_logits=False)
        exact = rows.run_head(states[:count], head)
        assert chosen.logits is None
        assert exact.logits is not None
        assert chosen.likeliest == exact.likeliest == exact.logits.argmax(-1).tolist()


def test_rough_logits_alone_would_find_others(config: ModelConfig) -> None:
    weight, states = near_ties()
    rows, head = head_of(config, weight, 1, 1.0)
    normed = RmsNorm(torch.ones(SIZE).bfloat16(), config.rms_norm_eps)(states).float()
    rough = (normed @ rounded(Action.INT8, weight).T).argmax(-1).tolist()
    assert rough != rows.run_head(states, head, wants_logits=False).likeliest


def test_what_is_no_number_gives_the_token_that_all_logits_give_and_its_neighbours_stay(config: ModelConfig) -> None:
    weight, states = loud_channels()
    states[4, 41], states[6, 3] = float("nan"), float("inf")
    weight[77, 2] = float("nan")
    for threads in (1, 2):
        rows, head = head_of(config, weight, threads, 1.0)
        for count in (7, 40):
            own = states[:count]
            assert rows.run_head(own, head, wants_logits=False).likeliest == rows.run_head(own, head).likeliest


def test_errors_are_what_int8_leaves_of_each_output() -> None:
    weight, _ = loud_channels()
    errors, lengths = int8_errors(FullLinear(weight)).tensors()
    left = (weight.float() - rounded(Action.INT8, weight)).norm(dim=1)
    torch.testing.assert_close(errors, left, rtol=1e-4, atol=0)
    torch.testing.assert_close(lengths, weight.float().norm(dim=1), rtol=1e-4, atol=0)
    assert (errors >= left).all()


@pytest.mark.parametrize("actions", [tuple(Action), (Action.SKIP, Action.FULL)])
def test_a_head_in_full_has_bounds_where_int8_is_packed_anyway(
    config: ModelConfig, actions: tuple[Action, ...]
) -> None:
    weight, _ = loud_channels()
    backend = NativeBackend(config, native_library(), actions, 1, shares_heads=False)
    tensors = {"embedding": weight, "final_norm": torch.ones(SIZE).bfloat16()}
    pack_head(dict.fromkeys(Part, tensors.__setitem__), FullLinear(weight), torch.arange(32))
    heads = backend.heads.make(PackedModel(config, tensors), 1.0, None)
    assert heads[Action.FULL].has_bounds is (Action.INT8 in actions)
