"""Decoding with compiled programs: one call for one row and layer, or shared products for a group of rows in FULL.

The counterpart of `Decoder.run_layer`'s eager way, for passes of one row per sequence. Knows layers and rows; knows
no policies and no requests.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.batch import Batch
from dash_runtime.decoder.layer import DecoderLayer, LayerLinears, mlp, scatter_rows
from dash_runtime.decoder.norm import RmsNorm
from dash_runtime.decoder.pending_kv import MAX_PENDING, group_rows
from dash_runtime.decoder.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import most_rows_apart
from dash_runtime.linears.row_kernels import RowMatrix, full_row_matrix, is_packable, pack_row_matrix
from dash_runtime.model_config import ModelConfig
from dash_runtime.programs.packing import WeightPacking
from dash_runtime.programs.program_cache import Program, ProgramKind, ProgramSpec
from dash_runtime.programs.traced_layer import ModelShape

_STRIDES = (8, 4, 1)
"""Rows of one sequence that one call takes in FULL; more are several calls."""


def program_specs(model: ModelConfig, actions: Sequence[Action], num_threads: int) -> list[ProgramSpec]:
    """The programs that decoding needs: a layer and late keys and values for each action that runs, a layer in FULL for
    a few rows of one sequence, attention, and the INT8 head."""
    running = [action for action in actions if action is not Action.SKIP]
    wanted = [(kind, action) for kind in (ProgramKind.LAYER, ProgramKind.LATE) for action in running]
    if Action.INT8 in actions:
        wanted.append((ProgramKind.HEAD, Action.INT8))
    shape = ModelShape.of(model)
    specs = [ProgramSpec(kind, action, shape, num_threads) for kind, action in wanted]
    specs += [ProgramSpec(ProgramKind.LAYER, Action.FULL, shape, num_threads, rows) for rows in _STRIDES if rows > 1]
    shared = (ProgramKind.ATTENTION, ProgramKind.NORM)
    return [*specs, *(ProgramSpec(kind, Action.FULL, shape, num_threads) for kind in shared)]


def can_compile(model: ModelConfig) -> bool:
    """Whether the programs can stand for this model's layers."""
    has_only_known_biases = not (model.block.has_output_bias or model.block.has_mlp_bias)
    has_long_windows = all(window is None or window > 1 for window in model.sliding_window)
    sizes = [*ModelShape.of(model).matrices(), (model.vocab_size, model.hidden_size)]
    return has_only_known_biases and has_long_windows and all(is_packable(*size) for size in sizes)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """One layer's inputs of the programs, by action where they differ."""

    vectors: list[Tensor]
    weights: Mapping[Action, list[Tensor]]


class CompiledLayers:
    """The layers of one decoder as programs.

    Args:
        shares_products: whether more than `most_rows_apart` rows in FULL share their products: faster, and a row's
            rounding then depends on whether it has neighbours. Otherwise each row runs alone.
    """

    def __init__(self, programs: Mapping[ProgramSpec, Program], shares_products: bool) -> None:
        self._programs = {(spec.kind, spec.action): program for spec, program in programs.items() if spec.num_rows == 1}
        self._full_programs = {
            spec.num_rows: program
            for spec, program in sorted(programs.items(), key=lambda item: -item[0].num_rows)
            if spec.kind is ProgramKind.LAYER and spec.action is Action.FULL
        }
        """By the rows that a call takes, most first."""
        self._running = [action for kind, action in self._programs if kind is ProgramKind.LAYER]
        self.shares_products = shares_products
        self._layers: list[_Tensors] = []

    @property
    def strides(self) -> tuple[int, ...]:
        """Rows of one sequence that a call takes in FULL, most first."""
        return tuple(self._full_programs)

    def drop_strides(self, strides: Collection[int]) -> None:
        """Has calls take so many rows no longer; one row remains."""
        for stride in set(strides) - {1}:
            del self._full_programs[stride]

    def add_layer(self, weights: LayerWeights, linears: LayerLinears) -> None:
        """Packs the next layer's matrices; `linears` are those for many rows in FULL."""
        vectors = [weights.input_norm.weight, weights.mlp_norm.weight]
        if weights.head_norm is not None:
            vectors.append(weights.head_norm)
        fused = weights.query_key_value
        if fused.bias is not None:
            vectors.append(fused.bias)
        matrices = (fused.weight, weights.output.weight, weights.gate_up.weight, weights.down.weight)
        packed = {action: self._pack(action, matrices, linears) for action in self._running}
        inputs = {action: WeightPacking.of(vectors, own).join(vectors, own) for action, own in packed.items()}
        self._layers.append(_Tensors(vectors, inputs))

    @staticmethod
    def _pack(action: Action, matrices: Sequence[Tensor], linears: LayerLinears) -> list[RowMatrix]:
        if action is not Action.FULL:
            return [pack_row_matrix(action, matrix) for matrix in matrices]
        return [full_row_matrix(*own) for own in zip(matrices, linears.matrices(), strict=True)]

    def run(self, layer: int, weights: DecoderLayer, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        """`Decoder.run_layer` for one row per sequence."""
        if len(actions) == 1:
            return self._run_row(layer, actions[0], hidden, batch, 0)
        parts: list[tuple[list[int] | None, Tensor]] = []
        for action, group in group_rows(actions):
            rows, inputs = (range(len(actions)), hidden) if group is None else (group, hidden[group])
            if action is Action.SKIP and self.shares_products:
                outputs = self._skip_rows(layer, inputs, batch, rows)
            elif action is Action.FULL and self.shares_products and len(rows) > most_rows_apart():
                outputs = self._run_full_rows(layer, weights, inputs, batch, rows)
            else:
                each = zip(inputs.split(1), rows, strict=True)
                outputs = torch.cat([self._run_row(layer, action, row_input, batch, row) for row_input, row in each])
            parts.append((group, outputs))
        return scatter_rows(parts, len(actions))

    def run_as_decoding(self, layer: int, hidden: Tensor, batch: Batch) -> Tensor:
        """Several rows of one sequence in FULL, each with the very numbers that it has where it is decoded alone."""
        parts: list[Tensor] = []
        first = 0
        for stride in self._calls(batch.num_rows, batch.sees_everything(layer)):
            last = first + stride - 1
            program, inputs = self._full_programs[stride], hidden[first : last + 1]
            tables = (torch.cat(own) for own in zip(*batch.row_tables[first : last + 1], strict=True))
            parts += program([inputs, *batch.seen(layer, last), *tables, *self._layers[layer].weights[Action.FULL]])
            first += stride
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _calls(self, num_rows: int, takes_several: bool) -> list[int]:
        """The rows of each call."""
        calls: list[int] = []
        while (left := num_rows - sum(calls)) > 0:
            calls.append(next(rows for rows in self._full_programs if rows <= left and (takes_several or rows == 1)))
        return calls

    def head(self, precision: Action, weight: Tensor, norm: RmsNorm) -> "CompiledHead | None":
        """The head of that precision, where there is a program for it."""
        program = self._programs.get((ProgramKind.HEAD, precision))
        return None if program is None else CompiledHead(program, norm.weight, pack_row_matrix(precision, weight))

    def _run_row(self, layer: int, action: Action, hidden: Tensor, batch: Batch, row: int) -> Tensor:
        if action is Action.SKIP:
            return self._skip_rows(layer, hidden, batch, (row,))
        if batch.spans[row].cache.pending[layer]:
            self._write_late(layer, action, batch, (row,))
        program = self._programs[ProgramKind.LAYER, action]
        weights = self._layers[layer].weights[action]
        return program([hidden, *batch.seen(layer, row), *batch.row_tables[row], *weights])[0]

    def _skip_rows(self, layer: int, inputs: Tensor, batch: Batch, rows: Sequence[int]) -> Tensor:
        own_pending = [batch.spans[row].cache.pending[layer] for row in rows]
        for pending, row_input in zip(own_pending, inputs.split(1), strict=True):
            pending.append(row_input)
        if full := [row for row, pending in zip(rows, own_pending, strict=True) if len(pending) == MAX_PENDING]:
            self._write_late(layer, Action.FULL, batch, full, num_own=1)
        return batch.compensate(layer, inputs, rows)

    def _run_full_rows(
        self, layer: int, weights: DecoderLayer, inputs: Tensor, batch: Batch, rows: Sequence[int]
    ) -> Tensor:
        """Rows in FULL, with one product and one attention for all of them."""
        if late := [row for row in rows if batch.spans[row].cache.pending[layer]]:
            self._write_late(layer, Action.FULL, batch, late)
        linears, vectors = weights.linears[Action.FULL], self._layers[layer].vectors
        attend, norm = (self._programs[kind, Action.FULL] for kind in (ProgramKind.ATTENTION, ProgramKind.NORM))
        fused = linears.query_key_value(norm([inputs, vectors[0]])[0])
        attended = attend([fused, *batch.seen_blocks(layer, rows), *vectors])[0]
        residual = inputs + linears.output(attended)
        return residual + mlp(linears, norm([residual, vectors[1]])[0])

    def _write_late(self, layer: int, action: Action, batch: Batch, rows: Sequence[int], num_own: int = 0) -> None:
        """Projects the pending keys and values of the rows' sequences, of which each one's last `num_own` are of this
        pass."""
        late = self._programs[ProgramKind.LATE, action]
        late([*batch.take_pending(layer, rows, num_own), *self._layers[layer].weights[action]])


class CompiledHead:
    """The final norm and the head as a program, row by row."""

    def __init__(self, program: Program, norm: Tensor, matrix: RowMatrix) -> None:
        self._program = program
        self._weights = [norm, *matrix.tensors()]

    def __call__(self, hidden: Tensor) -> Tensor:
        """float32 `[rows, vocab_size]` from the last layer's output, before its norm."""
        rows = [self._program([row, *self._weights])[0] for row in hidden.split(1)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
