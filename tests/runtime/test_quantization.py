"""The packed kernels stand for the matrices they say they do."""

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.devices.cuda import inner_k_tiles
from dash_runtime.linears.dense_linear import (
    BatchInvariantLinear,
    FullLinear,
    PackedLinear,
    make_full_linear,
    packed_words,
)
from dash_runtime.linears.grouped_matrix import GROUP_SIZE, is_nearly_exact, quantize_grouped
from dash_runtime.linears.quantization import (
    Int8Linear,
    for_many_rows,
    make_linear,
    precision_of_keys,
    quantize_int8,
    rounded_linear,
    supported_actions,
)
from tests.runtime.support import CPU

PARTS: dict[Action, tuple[int, int | None]] = {Action.INT4: (0, 32), Action.INT8: (32, None)}


def some_weight(rows: int = 64, columns: int = 96, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("action", "limit"), [(Action.INT8, 0.02), (Action.INT4, 0.12), (Action.INT3, 0.25)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_quantised_linear_is_close_to_the_full_one(action: Action, limit: float, has_bias: bool) -> None:
    full = FullLinear(some_weight(), some_weight(64, 1)[:, 0] if has_bias else None)
    inputs = some_weight(5, 96)
    expected, outputs = full(inputs).float(), make_linear(action, full)(inputs).float()
    assert (outputs - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("action", [Action.INT8, Action.INT4, Action.INT3])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("out_features", [64, 1088])
def test_many_rows_have_the_product_of_the_few_rows_kernel(action: Action, has_bias: bool, out_features: int) -> None:
    weight, bias = some_weight(out_features), some_weight(out_features, 1)[:, 0] if has_bias else None
    linear, inputs = make_linear(action, FullLinear(weight, bias)), some_weight(48, 96)
    wide = for_many_rows(linear)
    assert wide is not linear
    expected = linear(inputs).float()
    assert (wide(inputs).float() - expected).norm() < 0.005 * expected.norm()
    assert torch.equal(wide(inputs[:3]), linear(inputs[:3]))


def test_int4_computes_finer_outputs_in_int8() -> None:
    full, inputs = (
        FullLinear(some_weight(), some_weight(64, 1)[:, 0], keys_from=32, finer_keys=Action.INT8),
        some_weight(48, 96),
    )
    linear = make_linear(Action.INT4, full)
    rough, fine = (make_linear(action, full.outputs(*own)) for action, own in PARTS.items())
    assert torch.equal(linear(inputs), torch.cat((rough(inputs), fine(inputs)), dim=1))
    expected = rounded_linear(Action.INT4, full)(inputs).float()
    for own in (linear, for_many_rows(linear)):
        assert (own(inputs).float() - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(make_linear(Action.INT8, full)(inputs), Int8Linear.from_full(full)(inputs))


def test_int3_computes_keys_and_values_in_int4_where_that_changes_nothing() -> None:
    full, inputs = FullLinear(some_weight(), keys_from=32), some_weight(48, 96)
    rough, fine = make_linear(Action.INT3, full.outputs(0, 32)), make_linear(Action.INT4, full.outputs(32))
    assert torch.equal(make_linear(Action.INT3, full)(inputs), torch.cat((rough(inputs), fine(inputs)), dim=1))
    assert torch.equal(make_linear(Action.INT3, full.outputs(32))(inputs), fine(inputs))
    in_int4 = make_linear(Action.INT4, FullLinear(full.weight))(inputs)
    assert torch.equal(make_linear(Action.INT4, full)(inputs), in_int4)


@pytest.mark.parametrize("action", [Action.INT4, Action.INT3])
def test_finer_outputs_are_those_of_full_where_int8_has_no_kernel_that_pays(action: Action) -> None:
    assert precision_of_keys((Action.SKIP, Action.INT4, Action.FULL)) is Action.FULL
    full, inputs = FullLinear(some_weight(), keys_from=32, finer_keys=Action.FULL), some_weight(5, 96)
    rough, fine = make_linear(action, full.outputs(0, 32)), make_linear(Action.FULL, full.outputs(32))
    for linear in (make_linear(action, full), for_many_rows(make_linear(action, full))):
        assert torch.equal(linear(inputs), torch.cat((rough(inputs), fine(inputs)), dim=1))
    assert torch.equal(make_linear(action, full.outputs(32))(inputs), fine(inputs))  # a skipped row's
    assert torch.equal(rounded_linear(action, full).weight[32:], full.weight[32:])


def test_finer_outputs_stay_finer_among_fewer() -> None:
    full = FullLinear(some_weight(), keys_from=32, finer_keys=Action.INT8)
    ranges = [(0, 32), (0, 48), (32, None), (48, None)]
    assert [full.outputs(*own).keys_from for own in ranges] == [None, 32, 0, 0]
    linear = make_linear(Action.INT4, full.outputs(32))
    assert isinstance(linear, Int8Linear)
    assert len(linear.weight) == 32


def test_a_matrix_is_nearly_exact_in_int4_if_its_file_had_four_bits() -> None:
    weight = some_weight(200, 128, torch.float32)
    of_four_bits = quantize_grouped(weight, 4).dequantized()
    assert is_nearly_exact(of_four_bits)
    assert is_nearly_exact(of_four_bits.bfloat16())
    assert not is_nearly_exact(weight)
    of_four_bits[150:] = weight[150:]
    assert not is_nearly_exact(of_four_bits)


def test_int8_rounds_to_half_a_step_at_most() -> None:
    weight = some_weight(dtype=torch.float32)
    quantized, scales = quantize_int8(weight)
    error = (quantized.float() * scales.unsqueeze(1) - weight).abs()
    assert (error <= scales.unsqueeze(1) * 0.501).all()


def test_a_matrix_that_is_already_on_a_four_bit_grid_is_kept() -> None:
    levels = torch.arange(32).remainder(16).float().expand(64, 3, 32).reshape(64, 96)
    weight = levels * 0.25 - 1.5
    assert torch.equal(quantize_grouped(weight, 4).dequantized(), weight)


def test_the_grid_of_a_group_errs_less_than_the_one_from_its_least_weight_to_its_greatest() -> None:
    weight = some_weight(32, 128)
    groups = weight.float().view(32, -1, GROUP_SIZE)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = (high - low) / 15
    widest = (low + torch.round((groups - low) / scales) * scales).view(weight.shape)
    ours = rounded_linear(Action.INT4, FullLinear(weight)).weight.float()
    errors = [(own - weight.float()).square().mean() for own in (ours, widest)]
    assert errors[0] < 0.95 * errors[1]


def test_constant_and_zero_groups_are_kept() -> None:
    weight = torch.zeros(16, 64)
    weight[:, 32:] = 3.0
    torch.testing.assert_close(quantize_grouped(weight, 4).dequantized(), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cpu_offers_all_four_actions_for_shapes_that_suit_the_kernels(dtype: torch.dtype) -> None:
    assert supported_actions(CPU, dtype, {(64, 96), (96, 64)}) == tuple(Action)


def test_int4_is_not_offered_for_a_shape_that_its_kernel_cannot_take() -> None:
    assert Action.INT4 not in supported_actions(CPU, torch.bfloat16, {(64, 96), (64, 40)})


@pytest.mark.parametrize(("in_features", "tiles"), [(1536, 8), (128, 8), (576, 4), (960, 4), (96, 2), (32, 2)])
def test_cuda_packs_as_many_tiles_together_as_the_row_is_a_multiple_of(in_features: int, tiles: int) -> None:
    assert inner_k_tiles(in_features) == tiles


@pytest.mark.parametrize("in_features", [16, 40, 48, 80])
def test_a_row_that_cuda_has_no_packing_for_is_refused_as_a_missing_kernel(in_features: int) -> None:
    with pytest.raises(NotImplementedError, match=f"{in_features} inputs"):
        inner_k_tiles(in_features)
    assert Action.INT4 not in supported_actions(CPU, torch.bfloat16, {(64, in_features)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("in_features", [1536, 576, 96])
def test_a_gpu_offers_int4_whatever_packing_the_row_takes(in_features: int) -> None:
    assert Action.INT4 in supported_actions(torch.device("cuda"), torch.bfloat16, {(64, in_features)})


def test_a_packed_matrix_outlives_its_layer_in_the_memory_that_others_read() -> None:
    weight = some_weight(192, 96)
    linear = make_full_linear(FullLinear(weight))
    words = packed_words(linear)
    if words is None:
        pytest.skip("this CPU has no such product")
    assert isinstance(linear, BatchInvariantLinear)
    assert isinstance(linear.product, PackedLinear)
    assert words.data_ptr() == torch.ops.mkldnn.data_ptr(linear.product.packed)
    del linear
    churn = [some_weight(192, 96) for _ in range(50)]
    assert torch.equal(words.transpose(1, 2).flatten(0, 1).contiguous().view(torch.bfloat16), weight)
    del churn
