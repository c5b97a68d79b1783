"""Products of one row with packed matrices are right, row by row and part by part."""

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.linears.dense_linear import (
    BatchInvariantLinear,
    FullLinear,
    PackedLinear,
    make_full_linear,
    packed_words,
)
from dash_runtime.linears.quantization import dequantize_int4, quantize_int4, quantize_int8
from dash_runtime.linears.row_kernels import (
    TILE,
    RowMatrix,
    full_products,
    is_packable,
    pack_row_matrix,
    row_product,
)

pytestmark = pytest.mark.alone

RUNNING = (Action.INT4, Action.INT8, Action.FULL)
SHAPES = [(16, 32), (48, 32), (16, 160), (80, 96)]


def some_weight(out_features: int, in_features: int) -> Tensor:
    """Returns bf16 with outputs of very different sizes, a constant group and an output of zeros."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.logspace(-3, 2, out_features).unsqueeze(1)
    weight[0, :32] = 0.7
    weight[1] = 0.0
    return weight.bfloat16()


def some_inputs(num_rows: int, in_features: int) -> Tensor:
    """Returns float32 with a mean, which products that subtract an offset have to get right."""
    return torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(num_rows)) + 0.5


def rounded(action: Action, weight: Tensor) -> Tensor:
    """Returns the action's rounded matrix in float32."""
    if action is Action.INT4:
        return dequantize_int4(*quantize_int4(weight))
    if action is Action.INT8:
        quantized, scales = quantize_int8(weight)
        return quantized.float() * scales.float().unsqueeze(1)
    return weight.float()


def error(outputs: Tensor, inputs: Tensor, matrix: Tensor) -> float:
    """Returns the largest error, as a share of the sum of its terms' absolute values."""
    expected = inputs.double() @ matrix.double().T
    scale = inputs.double().abs() @ matrix.double().abs().T
    assert outputs.shape == expected.shape
    return float(((outputs - expected).abs() / scale.clamp_min(1e-6)).max())


@pytest.mark.parametrize("action", RUNNING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_product_is_that_with_the_matrix_that_the_packed_one_stands_for(
    action: Action, shape: tuple[int, int], num_rows: int
) -> None:
    weight, inputs = some_weight(*shape), some_inputs(num_rows, shape[1])
    outputs = row_product(action, inputs, pack_row_matrix(action, weight).tensors())
    assert outputs.dtype is torch.float32
    assert error(outputs, inputs, rounded(action, weight)) < 1e-4


@pytest.mark.parametrize("action", RUNNING)
def test_every_value_of_every_weight_comes_back_from_its_word(action: Action) -> None:
    num_values = 16 if action is Action.INT4 else 255
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(num_values, (32, 96), generator=generator).float() - num_values // 2
    weight[:, ::32], weight[:, 1::32] = -(num_values // 2), (num_values - 1) // 2  # each group has the whole range
    matrix = rounded(action, weight.bfloat16())
    outputs = row_product(action, torch.eye(96), pack_row_matrix(action, weight.bfloat16()).tensors())
    torch.testing.assert_close(outputs.T, matrix, rtol=1e-4, atol=1e-4 * num_values)


@pytest.mark.parametrize("action", RUNNING)
def test_several_rows_equal_rows_one_by_one(action: Action) -> None:
    tensors = pack_row_matrix(action, some_weight(80, 96)).tensors()
    inputs = some_inputs(5, 96)
    alone = torch.cat([row_product(action, row, tensors) for row in inputs.split(1)])
    torch.testing.assert_close(row_product(action, inputs, tensors), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("action", RUNNING)
@pytest.mark.parametrize("first", [0, TILE, 3 * TILE])
def test_the_part_for_later_outputs_gives_the_end_of_the_product(action: Action, first: int) -> None:
    matrix = pack_row_matrix(action, some_weight(80, 96))
    inputs = some_inputs(2, 96)
    part = row_product(action, inputs, matrix.outputs_from(first).tensors())
    torch.testing.assert_close(part, row_product(action, inputs, matrix.tensors())[:, first:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("action", RUNNING)
def test_a_part_shares_the_memory_of_the_whole(action: Action) -> None:
    matrix = pack_row_matrix(action, some_weight(48, 64))
    for whole, part in zip(matrix.tensors(), matrix.outputs_from(TILE).tensors(), strict=True):
        assert part.is_contiguous()
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize(("action", "bits"), [(Action.INT4, 5), (Action.INT8, 8), (Action.FULL, 16)])
def test_a_weight_takes_no_more_bits_than_its_action_says(action: Action, bits: int) -> None:
    matrix = pack_row_matrix(action, some_weight(64, 256)).tensors()[0]  # INT4's grid of each group among them
    assert matrix.numel() * matrix.element_size() * 8 == 64 * 256 * bits


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((16, 32), True), ((272, 96), True), ((260, 96), False), ((8, 32), False), ((16, 48), False), ((16, 16), False)],
)
def test_only_multiples_of_a_tile_and_a_group_are_packable(shape: tuple[int, int], expected: bool) -> None:
    assert is_packable(*shape) is expected


def shared(weight: Tensor) -> RowMatrix:
    return pack_row_matrix(Action.FULL, weight, make_full_linear(FullLinear(weight)))


@pytest.mark.parametrize("shape", [(64, 32), (192, 96), (80, 96)])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_matrix_in_full_is_the_same_in_whatever_memory(shape: tuple[int, int], num_rows: int) -> None:
    weight, inputs = some_weight(*shape), some_inputs(num_rows, shape[1])
    outputs = row_product(Action.FULL, inputs, shared(weight).tensors())
    assert error(outputs, inputs, weight.float()) < 1e-4


@pytest.mark.parametrize("first", [0, 16, 64, 80, 128])
def test_the_part_for_later_outputs_is_had_from_whatever_memory(first: int) -> None:
    weight, inputs = some_weight(192, 96), some_inputs(2, 96)
    part = row_product(Action.FULL, inputs, shared(weight).outputs_from(first).tensors())
    assert part.shape[1] < 192 - first + 64
    torch.testing.assert_close(part[:, first - 192 :], inputs @ weight[first:].float().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_rows", [4, 8])
@pytest.mark.parametrize("out_features", [80, 192])
def test_a_product_for_a_fixed_number_of_rows_equals_rows_one_by_one(num_rows: int, out_features: int) -> None:
    # Bit-equal only when compiled, which test_compiled.py tests.
    (matrix,) = shared(some_weight(out_features, 96)).tensors()
    inputs = some_inputs(num_rows, 96)
    alone = torch.cat([row_product(Action.FULL, row, (matrix,)) for row in inputs.split(1)])
    torch.testing.assert_close(full_products(inputs, matrix), alone, rtol=1e-4, atol=1e-3)


def test_weights_for_many_rows_and_for_one_are_in_memory_once_and_outlive_their_layer() -> None:
    weight = some_weight(192, 96)
    linear = make_full_linear(FullLinear(weight))
    words = packed_words(linear)
    if words is None:
        pytest.skip("this CPU has no such product for many rows")
    assert isinstance(linear, BatchInvariantLinear)
    assert isinstance(linear.product, PackedLinear)
    assert words.data_ptr() == torch.ops.mkldnn.data_ptr(linear.product.packed)
    assert pack_row_matrix(Action.FULL, weight, linear).tensors()[0].data_ptr() == words.data_ptr()
    del linear
    churn = [some_weight(192, 96) for _ in range(50)]
    assert torch.equal(words.transpose(1, 2).flatten(0, 1).contiguous().view(torch.bfloat16), weight)
    del churn
