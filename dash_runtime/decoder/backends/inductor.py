"""Decodes with compiled programs: one call per row and layer, or shared products for a group of rows in FULL.

For passes of one row per sequence, and for verification. Knows layers and rows; knows no policies and no requests.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.backend import OwnMemory
from dash_runtime.decoder.backends.whole_passes import WholePasses
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Compensation, Identity
from dash_runtime.layers.evaluation import Evaluation
from dash_runtime.layers.heads import Head, Heads
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.layers.layer_body import Linears, Norms, run_layer_body
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.layers.row_compensation import pack_for_rows
from dash_runtime.layers.row_groups import group_rows, scatter_rows
from dash_runtime.layers.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import Linear, for_neighbours, most_rows_apart
from dash_runtime.linears.row_kernels import pack_row_matrix
from dash_runtime.model_config import ModelConfig
from dash_runtime.programs.packing import WeightPacking
from dash_runtime.programs.program_cache import Program, ProgramKind, ProgramSpec
from dash_runtime.programs.row_calls import ProgramCall
from dash_runtime.programs.row_loop import RowLoop

_NORMS = ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")
"""A layer's norms, in the order in which it runs them."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's inputs for the programs, by action if they differ, and its matrices for rows that share products."""

    vectors: list[Tensor]
    weights: Mapping[Action, list[Tensor]]
    norms: Norms
    linears: Linears[Linear]


@dataclass(frozen=True, slots=True)
class _Skips:
    """The programs and inputs with which rows of one compensation skip layers."""

    compensation: Compensation
    """Kept, since its id is the key under which this is found."""
    program: Program
    rows_program: Program | None
    """For several rows; None if they skip one by one."""
    inputs: list[list[Tensor]]
    """By layer: the program's last inputs."""
    compensates: bool
    """False if the program only writes keys and values, since there is none for this compensation."""


class InductorBackend(OwnMemory):
    """Runs the layers of one decoder as programs.

    Args:
        programs: one for each of `program_specs`.
        shares_products: if True, more than `most_rows_apart` rows in FULL share their products. That is faster, but a
            row's rounding then depends on how many neighbours it has. Otherwise each row runs alone.
        row_loop: runs a single row's layers in one call; None: they are called one by one.
    """

    def __init__(
        self,
        config: ModelConfig,
        programs: Mapping[ProgramSpec, Program],
        shares_products: bool,
        row_loop: RowLoop | None = None,
    ) -> None:
        self._block = config.block
        self._whole_passes = None if row_loop is None else WholePasses(row_loop, config)
        self._programs = {
            (spec.kind, spec.action, spec.rank): program
            for spec, program in programs.items()
            if spec.num_rows == 1 and spec.policy is None
        }
        self._full_programs = {
            spec.num_rows: program
            for spec, program in sorted(programs.items(), key=lambda item: -item[0].num_rows)
            if spec.kind is ProgramKind.LAYER and spec.action is Action.FULL and spec.policy is None
        }
        """Programs by the number of rows that a call takes, largest first."""
        self._row_programs = {
            action: program for (kind, action, _), program in self._programs.items() if kind is ProgramKind.LAYER
        }
        self.shares_products = shares_products
        self._layers: list[_Layer] = []
        self._skips: dict[tuple[int, Action], _Skips] = {}
        self.logits = Heads({})

    @property
    def verified_rows(self) -> tuple[int, ...]:
        """Numbers of rows of one sequence that a call can take in FULL, largest first."""
        return tuple(self._full_programs)

    def drop_verified_rows(self, counts: Collection[int]) -> None:
        """Makes no more calls for these numbers of rows. Calls for one row remain."""
        for count in set(counts) - {1}:
            del self._full_programs[count]

    def add_layer(self, weights: LayerWeights, layer: DecoderLayer) -> None:
        """Packs the next layer's matrices for the programs; `layer` has those for eager passes in FULL."""
        vectors = layer_vectors(weights)
        linears = layer.linears[Action.FULL]
        matrices = [own.weight for own in weights.linears.matrices()]
        pairs = list(zip(matrices, linears.matrices(), strict=True))
        packed = {action: [pack_row_matrix(action, *pair) for pair in pairs] for action in self._row_programs}
        inputs = {action: WeightPacking.of(vectors, own).join(vectors, own) for action, own in packed.items()}
        program = self._programs[ProgramKind.NORM, Action.FULL, 0]
        norms: dict[str, Any] = {
            name: partial(_norm, program, norm.weight) for name, norm in _present(weights, *_NORMS).items()
        }
        shared = linears.mapped(for_neighbours, for_neighbours)
        self._layers.append(_Layer(vectors, inputs, Norms(**norms), shared))

    def set_heads(self, heads: Mapping[Action, Head], shared: Head) -> None:
        """Sets the heads by precision, and the one for many rows at once."""
        self.logits = Heads(heads, shared if self.shares_products else None, most_rows_apart())

    def head(self, precision: Action, weight: Tensor, norm: RmsNorm, multiplier: float) -> Head | None:
        """Returns norm and head of that precision as a program, run row by row; None if there is none."""
        program = self._programs.get((ProgramKind.HEAD, precision, 0))
        if program is None:
            return None
        weights = [norm.weight, *pack_row_matrix(precision, weight).tensors()]

        def head(hidden: Tensor) -> Tensor:
            if len(hidden) == 1:
                logits = program([hidden, *weights])[0]
            else:
                logits = torch.cat([program([row, *weights])[0] for row in hidden.split(1)])
            return logits if multiplier == 1 else logits * multiplier

        return head

    def takes(self, batch: Batch) -> bool:
        """Returns True for decoding, and for the verification of one sequence."""
        return batch.kind is PassKind.DECODE or len(batch.spans) == 1

    def takes_evaluations(self, num_rows: int) -> bool:
        """Returns True if each row runs its own programs. A row's decisions then do not depend on its neighbours."""
        return num_rows == 1 or not self.shares_products

    def rows_to_verify(self, num_rows: int) -> int:
        """A call for four rows takes less time than two for one row each."""
        left = num_rows % self.verified_rows[0]
        fitting = [rows for rows in self.verified_rows if rows >= left > 1]
        return num_rows - left + min(fitting, default=left)

    def run_layer(
        self,
        layer: int,
        actions: Sequence[Action],
        hidden: Tensor,
        batch: Batch,
        evaluations: Sequence[Evaluation | None] = (),
    ) -> Tensor:
        if batch.kind is PassKind.VERIFY:
            return self._verify(layer, hidden, batch)
        evaluations = evaluations or (None,) * len(actions)
        if len(actions) == 1:
            return self._run_row(layer, actions[0], hidden, batch, 0, evaluations[0])
        parts: list[tuple[list[int] | None, Tensor]] = []
        for action, group in group_rows(actions):
            rows, inputs = (range(len(actions)), hidden) if group is None else (group, hidden[group])
            together = self._skips_together(batch, rows) if action is Action.SKIP else None
            if together is not None:
                program, last_inputs = together
                outputs = program([inputs, *batch.skipped_inputs(layer, rows), *last_inputs[layer]])[0]
            elif action is Action.FULL and self.shares_products and len(rows) > most_rows_apart():
                outputs = self._run_full_rows(layer, inputs, batch, rows)
            else:
                each = zip(inputs.split(1), rows, strict=True)
                outputs = torch.cat(
                    [self._run_row(layer, action, own, batch, row, evaluations[row]) for own, row in each]
                )
            parts.append((group, outputs))
        return scatter_rows(parts, len(actions))

    def run_pass(self, plan: PassPlan, hidden: Tensor, batch: Batch) -> PassRun | None:
        if self._whole_passes is None or len(batch.spans) > 1:
            return None
        if batch.kind is PassKind.VERIFY:
            return self._verify_whole(self._whole_passes, plan, hidden, batch)
        skips = self._skips_of(batch.compensations[0], batch.kv_actions[0])
        if not skips.compensates:
            return None

        def calls_of(layer: int, evaluation: Evaluation | None) -> dict[Action, ProgramCall]:
            actions = (*self._row_programs, Action.SKIP) if evaluation is None else tuple(evaluation.programs)
            return {action: self._call(layer, action, skips, evaluation) for action in actions}

        return self._whole_passes.run(plan, hidden, batch, skips, calls_of)

    def _verify_whole(self, passes: WholePasses, plan: PassPlan, hidden: Tensor, batch: Batch) -> PassRun | None:
        program = self._full_programs.get(batch.num_rows)
        if program is None or (batch.num_rows > 1 and passes.has_windows):
            return None

        def calls_of(layer: int, _: Evaluation | None) -> dict[Action, ProgramCall]:
            return {Action.FULL: (program, self._layers[layer].weights[Action.FULL])}

        return passes.run(plan, hidden, batch, program, calls_of)

    def _call(self, layer: int, action: Action, skips: _Skips, evaluation: Evaluation | None) -> ProgramCall:
        """Returns a row's program for a layer, and its inputs after the row's own."""
        if action is Action.SKIP:
            program, inputs = skips.program, skips.inputs[layer]
        else:
            program, inputs = self._row_programs[action], self._layers[layer].weights[action]
        if evaluation is None:
            return program, inputs
        return evaluation.programs[action], [*inputs, *evaluation.inputs_by_layer[layer + 1]]

    def _verify(self, layer: int, hidden: Tensor, batch: Batch) -> Tensor:
        parts: list[Tensor] = []
        first = 0
        tables = batch.tables(layer)
        for count in self._calls(batch.num_rows, batch.sees_everything(layer)):
            last = first + count - 1
            program, inputs = self._full_programs[count], hidden[first : last + 1]
            own_tables = (own[first : last + 1] for own in tables)
            parts += program([inputs, *batch.seen(layer, last), *own_tables, *self._layers[layer].weights[Action.FULL]])
            first += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _calls(self, num_rows: int, takes_several: bool) -> list[int]:
        """Splits `num_rows` into calls; returns the number of rows of each."""
        calls: list[int] = []
        while (left := num_rows - sum(calls)) > 0:
            calls.append(next(rows for rows in self._full_programs if rows <= left and (takes_several or rows == 1)))
        return calls

    def _run_row(
        self, layer: int, action: Action, hidden: Tensor, batch: Batch, row: int, evaluation: Evaluation | None
    ) -> Tensor:
        skips = self._skips_of(batch.compensations[row], batch.kv_actions[row])
        program, inputs = self._call(layer, action, skips, evaluation)
        output = program([hidden, *batch.row_inputs(row)[layer], *inputs])[0]
        return skips.compensation(layer, hidden) if action is Action.SKIP and not skips.compensates else output

    def _skips_together(self, batch: Batch, rows: Sequence[int]) -> tuple[Program, Sequence[Sequence[Tensor]]] | None:
        """Returns the program with which the rows skip a layer in one call, and its last inputs by layer; None if they
        do so one by one."""
        first = self._skips_of(batch.compensations[rows[0]], batch.kv_actions[rows[0]])
        if not self.shares_products or len(rows) == 1 or first.rows_program is None:
            return None
        is_same = all(self._skips_of(batch.compensations[row], batch.kv_actions[row]) is first for row in rows)
        return (first.rows_program, first.inputs) if is_same else None

    def _skips_of(self, compensation: Compensation, kv_action: Action) -> _Skips:
        skips = self._skips.get((id(compensation), kv_action))
        if skips is None:
            skips = self._skips[id(compensation), kv_action] = self._make_skips(compensation, kv_action)
        return skips

    def _make_skips(self, compensation: Compensation, kv_action: Action) -> _Skips:
        sizes = len(self._layers), len(self._layers[0].vectors[0])
        packed = pack_for_rows(compensation, *sizes)
        program = None if packed is None else self._programs.get((ProgramKind.SKIP, kv_action, packed.rank))
        compensates = program is not None
        if packed is None or program is None:
            packed = pack_for_rows(Identity(), *sizes)
            program = self._programs[ProgramKind.SKIP, kv_action, 0]
            assert packed is not None
        rows_program = self._programs.get((ProgramKind.SKIP_ROWS, kv_action, packed.rank)) if compensates else None
        each = zip(self._layers, packed.layers, strict=True)
        inputs = [[*own.weights[kv_action], *tensors] for own, tensors in each]
        return _Skips(compensation, program, rows_program, inputs, compensates)

    def _run_full_rows(self, layer: int, inputs: Tensor, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Runs rows in FULL, with one product and one attention for all of them."""
        own = self._layers[layer]

        def attend(normed: Tensor) -> Tensor:
            fused = own.linears.query_key_value(normed)
            program = self._programs[ProgramKind.ATTENTION, Action.FULL, 0]
            return program([fused, *batch.seen_blocks(layer, rows), *own.vectors])[0]

        return run_layer_body(self._block, own.norms, own.linears, inputs, attend)


def layer_vectors(weights: LayerWeights) -> list[Tensor]:
    """Returns a layer's vectors in the order of `ModelShape.vector_sizes`."""
    norms = _present(weights, *_NORMS, "query_norm", "key_norm").values()
    others = (weights.head_norm, weights.linears.query_key_value.bias)
    return [*(norm.weight for norm in norms), *(own for own in others if own is not None)]


def _present(weights: LayerWeights, *names: str) -> dict[str, RmsNorm]:
    """Returns those of the norms that the layer has."""
    return {name: norm for name in names if (norm := getattr(weights, name)) is not None}


def _norm(program: Program, weight: Tensor, hidden: Tensor) -> Tensor:
    return program([hidden, weight])[0]
