"""One layer of a model, run by native code and by `layer_body.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.native import why_eager
from dash_runtime.decoder.backends.native_compensation import pack_for_rows
from dash_runtime.decoder.backends.packed_model import (
    layer_vectors,
    native_matrices,
    pack_router,
    packed_matrices,
    refined,
)
from dash_runtime.layers.attention import attention
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.kv_cache import BLOCK_TOKENS, rounded_block_bytes
from dash_runtime.layers.layer_body import Linears, run_layer_body, split_heads
from dash_runtime.layers.mlp import Mixture
from dash_runtime.layers.rotary import RotaryTable
from dash_runtime.layers.weight_loader import LayerWeights, WeightLoader
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.quantization import quantized_parts, refined_linear
from dash_runtime.model_config import BlockConfig
from dash_runtime.native.model import NativeModel, PackedLayer
from dash_runtime.native.pass_rows import RowsOfPass, RowSpan
from tests.runtime.native_code import in_bytes, native_library, rounded
from tests.runtime.support import CPU

LAYER, NUM_POSITIONS = 1, 12
SPANS = ((9, 1), (12, 3), (4, 2))
"""Sequences in one call: how many positions each has, and how many of them are its rows."""
FINER = "INT4, keys and values in INT8"


@dataclass(frozen=True)
class Written:
    """Rows' outputs, and the keys and values that they add."""

    outputs: Tensor
    keys: Tensor
    values: Tensor


class Case:
    """One layer of a family with some of its block replaced, and the memory of a few sequences."""

    def __init__(
        self,
        folder: Path,
        variant: Mapping[str, Any] | None = None,
        spans: Sequence[tuple[int, int]] = SPANS,
        num_positions: int = NUM_POSITIONS,
    ) -> None:
        config = load_model_config(folder)
        self.config = replace(config, block=replace(config.block, **(variant or {})))
        self.spans, self.num_positions = spans, num_positions
        assert why_eager(self.config, num_positions) is None
        tensors = {name: tensor.bfloat16() for name, tensor in open_weights(folder).items()}
        for name, tensor in tensors.items():  # norms and biases that are all alike would hide a mistake
            if tensor.dim() == 1:
                tensors[name] = (tensor + 0.3 * some(*tensor.shape, seed=sum(map(ord, name)))).bfloat16()
        self.weights = WeightLoader(self.config, tensors, torch.float32, CPU).layer(LAYER)
        rope = RotaryTable(self.config.ropes[LAYER], config.head_dim, num_positions, torch.bfloat16, CPU)
        self.tables = rope.cosines, rope.sines
        heads = config.num_kv_heads, config.head_dim
        self.memory = some(config.num_layers, 2, num_positions * len(spans), *heads, seed=2).bfloat16()
        self.hidden = some(sum(count for _, count in spans), config.hidden_size, seed=1).bfloat16()
        self.places = [(end - count + row, place) for place, (end, count) in enumerate(spans) for row in range(count)]

    def native(self, kernel: str) -> NativeModel:
        """Returns rows of which only one layer is packed, for one kernel."""
        rows = NativeModel(native_library(), self.config, [0] * self.config.num_layers, num_threads=2)
        action, weights = action_of(kernel), in_bfloat16(self.weights, kernel)
        matrices = native_matrices(weights)
        inputs = [own.weight.shape[1] for own in matrices]
        by_action = packed_matrices([action, Action.INT4], matrices)
        own = refined(by_action[Action.INT4], by_action[action]) if action is Action.INT8 else by_action[action]
        packed = list(zip(own, [*inputs, inputs[0]], strict=False))
        router = pack_router(weights.mlp.router) if isinstance(weights.mlp, Mixture) else None
        rows.set_layer(LAYER, PackedLayer(layer_vectors(self.weights), {action: packed}, router))
        return rows

    def run(
        self,
        kernel: str,
        is_skipped: bool = False,
        compensation: Compensation | None = None,
        apart: bool = False,
        keys_in_int8: bool = False,
    ) -> Written:
        """Runs the rows in native code, in one call or one by one."""
        rows, memory, action = self.native(kernel), self.memory.clone(), action_of(kernel)
        without_biases = replace(self.config, block=replace(self.config.block, has_qkv_bias=False))
        num_bytes = -(-self.num_positions // BLOCK_TOKENS) * rounded_block_bytes(without_biases)
        # What nobody wrote yet may be anything: these are NaN as scales.
        in_int8 = torch.full((self.config.num_layers, len(self.spans), num_bytes), 0xFF, dtype=torch.uint8)
        filled = torch.zeros(len(self.spans), self.config.num_layers, 2, dtype=torch.int64)
        packed = None
        if compensation is not None:
            packed = pack_for_rows(compensation, self.config.num_layers, self.config.hidden_size)
            assert packed is not None
        layers, values, tokens, *_ = (stride * memory.element_size() for stride in memory.stride())
        taken, outputs = Action.SKIP if is_skipped else action, []
        for first, spans in self._calls(apart):
            each, first_row = [], 0
            for place, end, count in spans:
                sequence = memory[:, :, place * self.num_positions :]
                rounded = in_int8[0, place].data_ptr(), in_int8.stride(0), filled[place].data_ptr()
                more = rounded if keys_in_int8 else ()
                each.append(RowSpan(sequence.data_ptr(), layers, values, end, first_row, count, *more))
                first_row += count
            cosines, sines = (own.data_ptr() for own in self.tables)
            given = RowsOfPass(each, tokens, [[(cosines, sines)]] * len(each))
            hidden = self.hidden[first : first + first_row]
            outputs.append(rows.run(hidden, given, taken, LAYER, packed, action))
        added = [place * self.num_positions + position for position, place in self.places]
        written = Written(torch.cat(outputs), *(memory[LAYER, part, added] for part in range(2)))
        memory[LAYER, :, added] = self.memory[LAYER, :, added]
        assert torch.equal(memory, self.memory)  # nothing else is written
        return written

    def _calls(self, apart: bool) -> list[tuple[int, list[tuple[int, int, int]]]]:
        """Returns the spans of each call by sequence, with the call's first row."""
        if apart:
            return [(row, [(place, position + 1, 1)]) for row, (position, place) in enumerate(self.places)]
        return [(0, [(place, *span) for place, span in enumerate(self.spans)])]

    def body(
        self, kernel: str, block: BlockConfig | None = None, inputs_in_bytes: bool = False, keys_in_int8: bool = False
    ) -> Written:
        """Runs each row by `layer_body.py` in float32, with the matrices that the kernel stands for."""
        block = self.config.block if block is None else block
        linears = rounded_linears(self.weights, kernel)
        if inputs_in_bytes:
            linears = linears.mapped(with_inputs_in_bytes, with_inputs_in_bytes)
        config, (window, heads) = (
            replace(self.config, block=block),
            (self.config.sliding_window[LAYER], self.config.num_heads),
        )
        seen = [self.memory[LAYER, part].float().unflatten(0, (-1, self.num_positions)).clone() for part in range(2)]

        def attend_row(row: Tensor, position: int, place: int) -> Tensor:
            cosines, sines = (own[position : position + 1].float() for own in self.tables)
            fused = linears.query_key_value(row)
            queries, *new = split_heads(config, self.weights, fused, heads, cosines, sines)
            for old, own in zip(seen, new, strict=True):
                old[place, position] = own.bfloat16().float()[0]
            first = 0 if window is None else max(0, position + 1 - window)
            keys, values = (own[place, first : position + 1] for own in seen)
            if keys_in_int8:
                firsts = seen[0][place, [at - at % BLOCK_TOKENS for at in range(first, position + 1)]]
                keys, values = firsts + in_int8(keys - firsts), in_int8(values)
            return attention(queries, keys, values, None, block.attention_scale)

        def attend(normed: Tensor) -> Tensor:
            return torch.cat([attend_row(row, *own) for row, own in zip(normed.split(1), self.places, strict=True)])

        outputs = run_layer_body(block, self.weights, linears, self.hidden.float(), attend)
        return Written(
            outputs, *(torch.stack([own[place, position] for position, place in self.places]) for own in seen)
        )


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_int8(vectors: Tensor) -> Tensor:
    """Rounds each to whole numbers of a step, the largest of which is 127."""
    steps = vectors.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return (vectors / steps).round() * steps


def with_inputs_in_bytes(linear: Linear) -> Linear:
    return lambda inputs: linear(in_bytes(inputs))


def action_of(kernel: str) -> Action:
    return {FINER: Action.INT4, "INT8": Action.INT8, "INT4": Action.INT4, "INT3": Action.INT3}.get(kernel, Action.FULL)


def in_bfloat16(weights: LayerWeights, kernel: str) -> Linears[FullLinear]:
    """Returns a layer's matrices; only those of FINER have outputs that are finer in INT4."""

    def convert(own: FullLinear) -> FullLinear:
        return replace(own, weight=own.weight.bfloat16(), finer_keys=own.finer_keys if kernel == FINER else None)

    assert weights.linears.query_key_value.finer_keys
    return weights.linears.mapped(convert, convert)


def rounded_linears(weights: LayerWeights, kernel: str) -> Linears[Linear]:
    """Returns the float32 matrices that the kernel stands for."""
    action = action_of(kernel)

    def convert(own: FullLinear) -> Linear:
        if action is Action.INT8:
            return refined_linear(own)
        parts = [(action, own)] if action is Action.FULL else quantized_parts(action, own)
        return FullLinear(torch.cat([rounded(precision, part.weight) for precision, part in parts]), own.bias)

    def in_full(router: FullLinear) -> Linear:
        return FullLinear(router.weight.float(), router.bias)

    return in_bfloat16(weights, kernel).mapped(convert, in_full)
