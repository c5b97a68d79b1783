"""Native products are those with the matrix that the packed one stands for, and a row's bits never depend on others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.grouped_matrix import is_packable, quantize_grouped
from dash_runtime.linears.quantization import refined_linear
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.matrix import NativeMatrix, RefinedNativeMatrix, pack_int4_and_further, pack_native_matrix
from dash_runtime.native.model import HeadRows, NativeModel
from tests.runtime.native_code import in_bytes, native_library, rounded

pytestmark = pytest.mark.usefixtures("each_level")

KINDS = ("FULL", "INT8", "INT4", "INT3", REFINED := "INT8 by INT4")
SHAPES = [(64, 32), (192, 96), (832, 160), (96, 64), (80, 96)]
"""Sizes with one block of four tiles, with a few, and with 13, which no number of threads divides; and with blocks of
two tiles and of one."""


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> ModelConfig:
    return load_model_config(tiny_folder)


def packed(kind: str, weight: Tensor) -> NativeMatrix:
    full = FullLinear(weight)
    return (
        RefinedNativeMatrix.of(*pack_int4_and_further(full))
        if kind == REFINED
        else pack_native_matrix(Action[kind], full)
    )


def stands_for(kind: str, weight: Tensor) -> Tensor:
    return refined_linear(FullLinear(weight)).weight if kind == REFINED else rounded(Action[kind], weight)


def product(
    config: ModelConfig, matrix: NativeMatrix, rows: Tensor, norm: Tensor, outputs: int, threads: int = 1
) -> Tensor:
    """Returns the products of normed rows, by way of a head."""
    own = replace(config, hidden_size=rows.shape[1], rms_norm_eps=0.0)
    model = NativeModel(native_library(), own, [0] * own.num_layers, threads)
    return HeadRows(model, matrix, norm, outputs, 1.0)(rows)


def some_weight(out_features: int, in_features: int) -> Tensor:
    """Returns bf16 with outputs of very different sizes, a constant group and an output of zeros."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.logspace(-3, 2, out_features).unsqueeze(1)
    weight[0, :32] = 0.7
    weight[1] = 0.0
    return weight.bfloat16()


def some_rows(num_rows: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Returns rows and a norm whose products are exact in bf16. They have a mean, which products that subtract an
    offset have to get right."""
    generator = torch.Generator().manual_seed(num_rows)
    signs = torch.where(torch.rand(num_rows, in_features, generator=generator) < 0.7, 1.0, -1.0)
    return signs.bfloat16(), torch.rand(in_features, generator=generator).bfloat16() + 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 32), (80, 96)])
@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_a_product_is_that_with_the_matrix_that_the_packed_one_stands_for(
    config: ModelConfig, kind: str, shape: tuple[int, int], num_rows: int
) -> None:
    weight, (rows, norm) = some_weight(*shape), some_rows(num_rows, shape[1])
    outputs = product(config, packed(kind, weight), rows, norm, shape[0])
    matrix, inputs = stands_for(kind, weight).double(), rows.double() * norm.double()
    scale = (inputs.abs() @ matrix.abs().T).clamp_min(1e-6)
    # Some processors multiply bytes.
    possible = [inputs] if kind == "FULL" else [inputs, in_bytes(inputs)]
    expected = [own @ matrix.T for own in possible]
    assert outputs.dtype is torch.float32
    assert outputs.shape == scale.shape
    assert min(float(((outputs - own).abs() / scale).max()) for own in expected) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_with_what_is_no_number_is_none(config: ModelConfig, kind: str, value: float) -> None:
    rows = torch.ones(9, 96).bfloat16()
    rows[4, 41] = value
    outputs = product(config, packed(kind, some_weight(192, 96)), rows, torch.ones(96), 192)
    assert outputs[[row for row in range(9) if row != 4]].isfinite().all()
    assert outputs[4].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_every_weight_comes_back_from_its_word(config: ModelConfig, kind: str) -> None:
    num_values = {"INT3": 8, "INT4": 16}.get(kind, 255)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(num_values, (128, 64), generator=generator).float() - num_values // 2
    weight[:, ::32], weight[:, 1::32] = -(num_values // 2), (num_values - 1) // 2  # each group has the whole range
    matrix = stands_for(kind, weight.bfloat16())
    unit_rows = torch.eye(64).bfloat16()  # of 64 numbers, so norming makes the 1 an 8
    outputs = product(config, packed(kind, weight.bfloat16()), unit_rows, torch.full((64,), 0.125), 128)
    torch.testing.assert_close(outputs.T, matrix, rtol=1e-4, atol=1e-4 * num_values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_among_any_number_of_others_with_any_number_of_threads(
    config: ModelConfig, kind: str, shape: tuple[int, int]
) -> None:
    matrix = packed(kind, some_weight(*shape))
    rows = torch.randn(50, shape[1], generator=torch.Generator().manual_seed(3)).bfloat16()
    norm = torch.ones(shape[1])
    alone = torch.cat([product(config, matrix, row, norm, shape[0]) for row in rows.split(1)])
    for num_rows in (*range(1, 18), 33, 50):
        for threads in (1, 2, 5):
            outputs = product(config, matrix, rows[:num_rows], norm, shape[0], threads)
            assert torch.equal(outputs, alone[:num_rows]), (num_rows, threads)


@pytest.mark.parametrize(("kind", "bits"), [("INT3", 3.5), ("INT4", 4.5), ("INT8", 8), ("FULL", 16), (REFINED, 8.5)])
def test_a_weight_takes_no_more_bits_than_its_action_says(kind: str, bits: float) -> None:
    # The grid of each group is among them.
    words = [own for own in packed(kind, some_weight(64, 256)).tensors() if own.dtype is torch.int32]
    assert sum(own.nbytes for own in words) * 8 == 64 * 256 * bits


def test_int8_shares_the_words_of_int4_and_is_about_as_near_to_the_weights_as_int8_alone() -> None:
    weight = some_weight(192, 256)
    coarse, further = pack_int4_and_further(FullLinear(weight))
    assert RefinedNativeMatrix.of(coarse, further).words is coarse.words
    alone = pack_native_matrix(Action.INT4, FullLinear(weight))
    assert all(map(torch.equal, coarse.tensors(), alone.tensors()))
    errors = [(stands_for(kind, weight) - weight.float()).norm() for kind in (REFINED, "INT8", "INT4")]
    assert errors[0] < 1.5 * errors[1] < 0.2 * errors[2]


def test_what_int4_was_rounded_to_by_its_inputs_may_be_a_step_away() -> None:
    weight = some_weight(64, 64)
    nearest = quantize_grouped(weight, 4)
    moved = replace(
        nearest, values=(nearest.values.int() + torch.tensor([1, -1]).repeat(32)).clamp(0, 15).to(torch.uint8)
    )
    full = FullLinear(weight, rounded={Action.INT4: moved})
    error = refined_linear(full).weight - weight.float()
    assert (error.abs() <= moved.grids()[0].repeat_interleave(32, 1) * 0.7).all()
    assert error.norm() < 0.3 * (moved.dequantized() - weight.float()).norm()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((16, 32), True), ((272, 96), True), ((260, 96), False), ((8, 32), False), ((16, 48), False), ((16, 16), False)],
)
def test_only_multiples_of_a_tile_and_a_group_are_packable(shape: tuple[int, int], expected: bool) -> None:
    assert is_packable(*shape) is expected
