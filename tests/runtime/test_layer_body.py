"""A layer's arithmetic is written twice, for eager passes and in native code, and both compute the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.native import layer_vectors, packed_matrices, why_eager
from dash_runtime.layers.attention import attention
from dash_runtime.layers.compensation import Affine, Compensation, Identity, LowRank, PackedLowRank, Scale
from dash_runtime.layers.layer_body import Linears, before_attention, run_layer_body, split_heads
from dash_runtime.layers.rotary import RotaryTable
from dash_runtime.layers.row_compensation import pack_for_rows
from dash_runtime.layers.weight_loader import LayerWeights, WeightLoader
from dash_runtime.linears.dense_linear import FullLinear, Linear, make_full_linear
from dash_runtime.linears.quantization import quantized_parts
from dash_runtime.model_config import Activation, BlockConfig, ModelConfig
from dash_runtime.rows.model_rows import ModelRows, PackedLayer
from dash_runtime.rows.pass_rows import RowsOfPass, RowSpan
from dash_runtime.rows.row_matrix import pack_row_matrix
from tests.runtime.native_code import NATIVE_SIZES, in_bytes, native_library, rounded
from tests.runtime.support import CPU
from tests.tiny_models import FAMILIES, save_tiny_model

LAYER, NUM_POSITIONS = 1, 12
SPANS = ((9, 1), (12, 3), (4, 2))
"""Sequences in one call: how many positions each has, and how many of them are its rows."""
EAGER_FAMILIES = (
    "llama-untied-biased",
    "granite-untied-biased",
    "olmo2-tied-biased",
    "qwen3-moe",
    "qwen3-moe-tied-unnormed",
)
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6}
OVERRIDES = {"ministral3-sliding-window": {"head_dim": 32}} | {
    family: {"rope_parameters": FAMILIES[family][1]["rope_parameters"] | _FACTORS}
    for family in ("phi3-longrope", "phi3-longrope-sliding-window")
}
"""Heads as long as native code needs them."""
FINER = "INT4, keys and values in INT8"
KERNELS = ("blocks", "tiles", "INT8", "INT4", FINER)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gelu": {"activation": Activation.GELU_TANH},
    "attention scale": {"attention_scale": 0.3},
    "residual multiplier": {"residual_multiplier": 0.22},
}


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family not in EAGER_FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    sizes = NATIVE_SIZES | OVERRIDES.get(family, {})
    return save_tiny_model(tmp_path_factory.mktemp("models") / family, family, **sizes)


@dataclass(frozen=True)
class Written:
    """Rows' outputs, and the keys and values that they add."""

    outputs: Tensor
    keys: Tensor
    values: Tensor


class Case:
    """One layer of a family with some of its block replaced, and the memory of a few sequences."""

    def __init__(self, folder: Path, variant: str = "as it is") -> None:
        config = load_model_config(folder)
        self.config = replace(config, block=replace(config.block, **VARIANTS[variant]))
        assert why_eager(self.config, NUM_POSITIONS) is None
        tensors = {name: tensor.bfloat16() for name, tensor in open_weights(folder).items()}
        for name, tensor in tensors.items():  # norms and biases that are all alike would hide a mistake
            if tensor.dim() == 1:
                tensors[name] = (tensor + 0.3 * some(*tensor.shape, seed=sum(map(ord, name)))).bfloat16()
        self.weights = WeightLoader(self.config, tensors, torch.float32, CPU).layer(LAYER)
        rope = RotaryTable(self.config.ropes[LAYER], config.head_dim, NUM_POSITIONS, torch.bfloat16, CPU)
        self.tables = rope.cosines, rope.sines
        heads = config.num_kv_heads, config.head_dim
        self.memory = some(config.num_layers, 2, NUM_POSITIONS * len(SPANS), *heads, seed=2).bfloat16()
        self.hidden = some(sum(count for _, count in SPANS), config.hidden_size, seed=1).bfloat16()
        self.places = [(end - count + row, place) for place, (end, count) in enumerate(SPANS) for row in range(count)]

    def native(self, kernel: str) -> ModelRows:
        """Returns rows of which only one layer is packed, for one kernel."""
        rows = ModelRows(native_library(), self.config, [0] * self.config.num_layers, num_threads=2)
        action, weights = action_of(kernel), in_bfloat16(self.weights, kernel)
        if kernel == "tiles":
            packed = [(pack_row_matrix(action, own.weight), own.weight.shape[1]) for own in weights.matrices()]
        else:
            packed = packed_matrices(action, weights, weights.mapped(make_full_linear, make_full_linear))
        rows.set_layer(LAYER, PackedLayer(layer_vectors(self.weights), {action: packed}))
        return rows

    def run(
        self, kernel: str, is_skipped: bool = False, compensation: Compensation | None = None, apart: bool = False
    ) -> Written:
        """Runs the rows in native code, in one call or one by one."""
        rows, memory, action = self.native(kernel), self.memory.clone(), action_of(kernel)
        packed = None
        if compensation is not None:
            packed = pack_for_rows(compensation, self.config.num_layers, self.config.hidden_size)
            assert packed is not None
        pinned, outputs = bytes([Action.SKIP if is_skipped else action]), []
        for first, spans in self._calls(apart):
            each, first_row = [], 0
            for place, end, count in spans:
                sequence = memory[:, :, place * NUM_POSITIONS :]
                each.append(RowSpan(sequence.data_ptr(), end, first_row, count))
                first_row += count
            layers, values, tokens, *_ = (stride * memory.element_size() for stride in memory.stride())
            cosines, sines = (own.data_ptr() for own in self.tables)
            given = RowsOfPass(each, (layers, values, tokens), [[(cosines, sines)]] * len(each))
            hidden = self.hidden[first : first + first_row]
            outputs.append(rows.run(hidden, given, pinned, range(LAYER, LAYER + 1), packed, action))
        added = [place * NUM_POSITIONS + position for position, place in self.places]
        written = Written(torch.cat(outputs), *(memory[LAYER, part, added] for part in range(2)))
        memory[LAYER, :, added] = self.memory[LAYER, :, added]
        assert torch.equal(memory, self.memory)  # nothing else is written
        return written

    def _calls(self, apart: bool) -> list[tuple[int, list[tuple[int, int, int]]]]:
        """Returns the spans of each call by sequence, with the call's first row."""
        if apart:
            return [(row, [(place, position + 1, 1)]) for row, (position, place) in enumerate(self.places)]
        return [(0, [(place, *span) for place, span in enumerate(SPANS)])]

    def body(self, kernel: str, block: BlockConfig | None = None) -> Written:
        """Runs each row by `layer_body.py` in float32, with the matrices that the kernel stands for."""
        block = self.config.block if block is None else block
        linears = rounded_linears(self.weights, kernel)
        config, (window, heads) = (
            replace(self.config, block=block),
            (self.config.sliding_window[LAYER], self.config.num_heads),
        )
        seen = [self.memory[LAYER, part].float().unflatten(0, (-1, NUM_POSITIONS)).clone() for part in range(2)]

        def attend_row(row: Tensor, position: int, place: int) -> Tensor:
            cosines, sines = (own[position : position + 1].float() for own in self.tables)
            fused = linears.query_key_value(row)
            queries, *new = split_heads(config, self.weights, fused, heads, cosines, sines)
            for old, own in zip(seen, new, strict=True):
                old[place, position] = own.bfloat16().float()[0]
            first = 0 if window is None else max(0, position + 1 - window)
            keys, values = (own[place, first : position + 1] for own in seen)
            return attention(queries, keys, values, None, block.attention_scale)

        def attend(normed: Tensor) -> Tensor:
            return torch.cat([attend_row(row, *own) for row, own in zip(normed.split(1), self.places, strict=True)])

        outputs = run_layer_body(block, self.weights, linears, self.hidden.float(), attend)
        return Written(
            outputs, *(torch.stack([own[place, position] for position, place in self.places]) for own in seen)
        )


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def action_of(kernel: str) -> Action:
    return {FINER: Action.INT4, "INT8": Action.INT8, "INT4": Action.INT4}.get(kernel, Action.FULL)


def in_bfloat16(weights: LayerWeights, kernel: str) -> Linears[FullLinear]:
    """Returns a layer's matrices; only those of FINER have outputs that are finer in INT4."""

    def convert(own: FullLinear) -> FullLinear:
        return replace(own, weight=own.weight.bfloat16(), finer_from=own.finer_from if kernel == FINER else None)

    assert weights.linears.query_key_value.finer_from is not None
    return weights.linears.mapped(convert, convert)


def rounded_linears(weights: LayerWeights, kernel: str) -> Linears[Linear]:
    """Returns the float32 matrices that the kernel stands for."""
    action = action_of(kernel)

    def convert(own: FullLinear) -> Linear:
        parts = [(action, own)] if action is Action.FULL else quantized_parts(action, own)
        return FullLinear(torch.cat([rounded(precision, part.weight) for precision, part in parts]), own.bias)

    return in_bfloat16(weights, kernel).mapped(convert, convert)


def assert_close(kernel: str, written: Written, expected: Written) -> None:
    # Where the processor multiplies bf16, products in FULL get their inputs rounded to it; where it multiplies bytes,
    # the others get theirs rounded to these.
    tolerance = 0.04 if kernel in ("blocks", "tiles") else 0.15
    for name in ("outputs", "keys", "values"):
        own, wanted = getattr(written, name).float(), getattr(expected, name)
        torch.testing.assert_close(own, wanted, rtol=0.01, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_native_rows_of_every_kernel_compute_what_the_layer_body_does(folder: Path, variant: str) -> None:
    case = Case(folder, variant)
    for kernel in KERNELS:
        assert_close(kernel, case.run(kernel), expected := case.body(kernel))
        if variant != "as it is":  # or the comparison would show nothing
            usual = {name: getattr(BlockConfig(), name) for name in VARIANTS[variant]}
            as_usual = case.body(kernel, replace(case.config.block, **usual))
            assert not torch.allclose(as_usual.outputs, expected.outputs, rtol=0.01, atol=0.01)


@torch.inference_mode()
def test_rows_have_the_same_bits_together_as_one_by_one(folder: Path) -> None:
    case = Case(folder)
    for kernel in KERNELS:
        for is_skipped in (False, True):
            together, alone = (case.run(kernel, is_skipped, Identity(), apart) for apart in (False, True))
            assert all(map(torch.equal, vars(together).values(), vars(alone).values())), (kernel, is_skipped)


@torch.inference_mode()
def test_skipped_rows_write_the_keys_and_values_of_the_layer_body(folder: Path) -> None:
    case = Case(folder)
    for kernel in KERNELS:
        normed = before_attention(case.weights, case.hidden.float())
        fused = rounded_linears(case.weights, kernel).query_key_value(normed)
        cosines, sines = (own[[position for position, _ in case.places]].float() for own in case.tables)
        _, *added = split_heads(case.config, case.weights, fused, case.config.num_heads, cosines, sines)
        assert_close(kernel, case.run(kernel, True, Identity()), Written(case.hidden.float(), *added))


def compensations(config: ModelConfig) -> Sequence[Compensation]:
    num_layers, size = config.num_layers, config.hidden_size
    factors, offsets = 1 + 0.1 * some(num_layers, size, seed=5).bfloat16(), some(num_layers, size, seed=6).bfloat16()
    low_ranks = []
    for rank in (32, 48):  # kernels read 32 inputs at a time
        down, up = 0.2 * some(num_layers, rank, size, seed=7), 0.2 * some(num_layers, size, rank, seed=8)
        low_ranks.append(PackedLowRank.from_low_rank(LowRank(down, up, offsets), torch.bfloat16))
    return Identity(), Scale(factors[:, 0]), Affine(factors, offsets), *low_ranks


@torch.inference_mode()
def test_native_compensation_is_that_of_eager_passes(tmp_path: Path) -> None:
    case = Case(save_tiny_model(tmp_path / "model", "llama", **NATIVE_SIZES))
    hidden = case.hidden.float()
    for compensation in compensations(case.config):
        wide = compensation.to_low_rank() if isinstance(compensation, PackedLowRank) else compensation
        possible = [wide(LAYER, hidden).float()]
        if isinstance(wide, LowRank):  # some processors multiply bytes
            down, up, offsets = wide.down[LAYER], wide.up[LAYER], wide.offsets[LAYER]
            possible.append(hidden + in_bytes(in_bytes(hidden) @ down.T) @ up.T + offsets)
        outputs = case.run("INT8", True, compensation).outputs.float()
        assert any(torch.allclose(outputs, expected, rtol=0.01, atol=0.01) for expected in possible)


@pytest.mark.parametrize("family", EAGER_FAMILIES)
def test_these_families_run_eagerly(family: str, tmp_path: Path) -> None:
    config = load_model_config(save_tiny_model(tmp_path / family, family, **NATIVE_SIZES))
    assert why_eager(config, NUM_POSITIONS) in ("biases of outputs", "mixtures of experts")
