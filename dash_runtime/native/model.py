"""A model's layers, packed for the native code, and the calls that take rows through them.

Knows matrices, memory and positions; knows no sequences and no policies.
"""

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from ctypes import Array, addressof, c_int64, pointer
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.devices.step_timer import StepTimer
from dash_runtime.model_config import Activation, ModelConfig
from dash_runtime.native.burst_record import BurstRecord, draw_structs, guesses_struct
from dash_runtime.native.head_struct import (
    HeadBounds,
    NarrowHead,
    RoughMatrix,
    head_struct,
    numbers_struct,
    packed_struct,
)
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.matrix import NativeMatrix
from dash_runtime.native.pass_rows import CompensatedLayers, NativePlan, NativePlans, PlannerTable, RowsOfPass
from dash_runtime.native.structs import (
    LANES,
    NO_FILE,
    EmbeddingStruct,
    HeadsStruct,
    LayerStruct,
    ModelStruct,
    PassStruct,
)
from dash_runtime.native.thread_count import ThreadCount
from dash_runtime.passes import MOST_GUESSES, Draw, Limit, OnePass, PassResult

_ALIKE_TOKENS = 512
"""Passes whose contexts differ by less take about the same time."""
_ACTIVATIONS = {Activation.SILU: 0, Activation.GELU_TANH: 1}


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One layer's float32 vectors by the names of `LayerStruct`, and by action its matrices: query-key-value, output,
    gate-up and down, each with its number of inputs; and keys and values, if the first one has only the queries."""

    vectors: Mapping[str, Tensor]
    matrices: Mapping[Action, Sequence[tuple[NativeMatrix, int]]]
    router: NativeMatrix | None = None
    """The router of a mixture, in FULL, padded to whole tiles. Gate-up and down have all experts' outputs then, one
    after the other."""


def _experts_of(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the number of experts, in whole tiles, how many a row has, and their size."""
    mixture = config.mixture
    if mixture is None:
        return 0, 0, 0
    return -(-mixture.num_experts // LANES) * LANES, mixture.num_chosen, mixture.expert_size


class NativeModel:
    """One model's packed layers, embedding and heads. Not reentrant: a call's memory is here.

    Args:
        rotary_of: each layer's number of its rotary table.
    """

    def __init__(self, library: NativeLibrary, config: ModelConfig, rotary_of: Sequence[int], num_threads: int) -> None:
        self._library = library
        self._query_size, self._num_layers = config.query_size, config.num_layers
        self._hidden_size, self._all_layers = config.hidden_size, range(config.num_layers)
        block = config.block
        scale = config.head_dim**-0.5 if block.attention_scale is None else block.attention_scale
        self._shape = ModelStruct(
            HeadsStruct(config.num_heads, config.num_kv_heads, config.head_dim, scale),
            *(config.hidden_size, config.intermediate_size, _ACTIVATIONS[block.activation], config.num_layers),
            *(config.rms_norm_eps, block.residual_multiplier),
            *_experts_of(config),
        )
        self._mixtures = [config.mixture_of(layer) for layer in range(config.num_layers)]
        self._layers = (LayerStruct * config.num_layers)()
        self._kept: list[object] = []
        self._uncompensated = CompensatedLayers(config.num_layers, None)
        # One plan for all rows, of some layers.
        self._one = NativePlans([NativePlan(bytes(config.num_layers), None, self._uncompensated, Action.FULL)])
        self._times = array("q", bytes(16 * config.num_layers))

        own = self._pass = PassStruct()
        own.workspace = library.new_workspace(self)
        self._threads = ThreadCount(num_threads)
        own.shape, own.layers = pointer(self._shape), self._layers
        own.windows = numbers_struct([window or 0 for window in config.sliding_window])
        own.rotary_of = numbers_struct(rotary_of)
        own.times = self._times.buffer_info()[0]
        self._pass_address = addressof(own)
        self._tokens: dict[int, tuple[Array[c_int64], Array[c_int64]]] = {}
        """By number of rows, the memory of tokens and of the likeliest next ones."""
        self._kept_embedding: object = None
        self._plans: NativePlans | None = None
        self._rows: RowsOfPass | None = None
        """The plans and rows that the fields of the pass are of."""

    def set_embedding(self, words: Tensor, multiplier: float) -> None:
        """Takes the bf16 matrix of the embedding, `[vocab_size, hidden_size]`."""
        embedding = EmbeddingStruct(words.data_ptr(), multiplier)
        self._pass.embedding, self._kept_embedding = pointer(embedding), words

    def set_layer(self, layer: int, packed: PackedLayer) -> None:
        """Takes a layer's tensors, and keeps them."""
        struct = self._layers[layer]
        for name, vector in packed.vectors.items():
            setattr(struct, name, self._memory_of(vector))
        for action, matrices in packed.matrices.items():
            for place, (matrix, num_inputs) in enumerate(matrices):
                struct.matrices[action - 1][place], kept = packed_struct(matrix, num_inputs)
                self._kept += kept
        if (mixture := self._mixtures[layer]) is not None:
            assert packed.router is not None
            own = struct.mixture
            own.router, kept = packed_struct(packed.router, self._hidden_size)
            own.num_experts, own.num_chosen = mixture.num_experts, mixture.num_chosen
            own.has_normed_shares = mixture.has_normed_shares
            self._kept += kept

    def run(
        self,
        hidden: Tensor,
        rows: RowsOfPass,
        action: Action,
        layer: int,
        compensation: CompensatedLayers | None,
        kv_action: Action,
    ) -> Tensor:
        """Runs one layer of rows with one action, from bf16 `[rows, hidden_size]` to the same.

        Args:
            kv_action: the precision of skipped rows' keys and values.
        """
        output = torch.empty_like(hidden)
        own = self._pass
        own.tokens = own.head = own.planner = None
        own.input, own.output = hidden.data_ptr(), output.data_ptr()
        self._one.pin(layer, action, self._uncompensated if compensation is None else compensation, kv_action)
        self._run(rows, self._one, range(layer, layer + 1), b"")
        return output

    def run_tokens(
        self,
        token_ids: Sequence[int],
        rows: RowsOfPass,
        plans: NativePlans,
        head: "HeadRows | None",
        planner: PlannerTable | None = None,
        wants_logits: bool = True,
    ) -> PassResult:
        """Runs all layers of the rows of these tokens, and the head.

        Without a head the result ends with the states. With one it has logits, if they are wanted or the head cannot do
        without. With several plans each sequence has one row, and rows agree on actions by the planner's table, if
        there is one.
        """
        started_ns, own, num_rows = time.perf_counter_ns(), self._pass, len(token_ids)
        memory = self._tokens.get(num_rows)
        if memory is None:
            memory = self._tokens[num_rows] = (c_int64 * num_rows)(), (c_int64 * num_rows)()
        tokens, likeliest = memory
        tokens[:] = list(token_ids)
        own.tokens = tokens
        own.planner = None if planner is None else planner.pointer
        logits = None if head is None else self._logits_of(head, num_rows, wants_logits)
        states = None if logits is not None else torch.empty(num_rows, self._hidden_size, dtype=torch.bfloat16)
        own.output, own.likeliest = None if states is None else states.data_ptr(), likeliest
        if head is None:
            own.head = None
        self._run(rows, plans, self._all_layers, plans.pinned)
        record = OnePass(StepTimer(array("q", self._times)), started_ns, plans.scores)
        return PassResult([] if head is None else likeliest[:], plans.ran(num_rows), record, logits, states)

    def run_burst(
        self,
        token_id: int,
        limit: Limit,
        rows: RowsOfPass,
        plans: NativePlans,
        head: "HeadRows",
        guessed: NativePlans | None = None,
    ) -> PassResult:
        """Decodes a lone row's tokens up to a limit, the first after `token_id`; only one while numbers of threads are
        tried.

        Args:
            guessed: the only plan of passes with guesses.
        """
        if self._threads.is_trying:
            limit = replace(limit, count=1)
        own, draws, ends = self._pass, limit.draws, limit.end_ids
        record = BurstRecord(limit.most, self._num_layers, plans.num_score_bytes)
        own.tokens, own.output, own.planner = (c_int64 * 1)(token_id), None, None
        guesses, text = None, None
        if limit.guesses is not None:
            struct, text = guesses_struct(limit.guesses, limit.most)
            guesses = pointer(struct)
        logits = self._logits_of(head, 1 + MOST_GUESSES if guesses else 1, bool(draws))  # kept until all have run
        own_draws = draw_structs(draws) if draws else None
        arguments = limit.count, numbers_struct(list(ends)), len(ends), own_draws, addressof(record.struct)
        wake_file = NO_FILE if limit.wake_file is None else limit.wake_file
        more = wake_file, guesses, None if guessed is None else guessed.array

        def run(address: int) -> tuple[float, int]:
            record.num_tokens = self._library.run_burst(address, *arguments, *more)
            return record.plain_seconds, record.num_plain

        self._run(rows, plans, self._all_layers, plans.pinned, run)
        del logits, text
        return record.result()

    def draw(self, logits: Tensor, draws: Mapping[int, Draw]) -> list[int]:
        """Draws a token for each of some rows of float32 logits `[rows, vocab_size]`."""
        tokens, logits = (c_int64 * len(draws))(), logits.contiguous()
        own = numbers_struct(list(draws)), draw_structs(draws.values()), len(draws)
        self._library.draw(logits.data_ptr(), logits.shape[1], *own, self._threads.current, tokens)
        return tokens[:]

    def run_head(self, hidden: Tensor, head: "HeadRows", wants_logits: bool = True) -> "Chosen":
        """Runs the final norm and a head of bf16 states `[rows, hidden_size]`."""
        own, hidden, num_rows = self._pass, hidden.contiguous(), len(hidden)
        self._set_plans(self._one)
        likeliest = (c_int64 * num_rows)()
        own.tokens, own.input, own.output, own.likeliest = None, hidden.data_ptr(), None, likeliest
        self._rows, own.planner = None, None
        own.first_layer, own.last_layer, own.num_spans, own.num_rows = 0, 0, 0, num_rows
        logits = self._logits_of(head, num_rows, wants_logits)
        own.num_threads = self._threads.current
        self._library.run_rows(self._pass_address)
        return Chosen(logits, likeliest[:])

    def _run(
        self,
        rows: RowsOfPass,
        plans: NativePlans,
        layers: range,
        work: bytes,
        function: Callable[[int], tuple[float, int] | None] | None = None,
    ) -> None:
        """Calls the function, by default for one pass. Another one returns the seconds and the number of passes of
        this work that it ran."""
        own = self._pass
        own.first_layer, own.last_layer = layers.start, layers.stop
        self._set_plans(plans)
        is_seen = len(layers) == self._num_layers and self._threads.is_seen()
        started = time.perf_counter() if is_seen else 0.0
        seconds, num_passes = self._call(function or self._library.run_rows, rows) or (None, 1)
        if is_seen and num_passes:
            seconds = time.perf_counter() - started if seconds is None else seconds
            alike = work, rows.num_rows, rows.spans[0].num_tokens // _ALIKE_TOKENS
            self._threads.took(alike, seconds / num_passes, num_passes)

    def _set_plans(self, plans: NativePlans) -> None:
        if plans is not self._plans:  # fields are written as seldom as can be: a token's take long after its weights
            self._plans = plans
            self._pass.plans, self._pass.num_plans = plans.array, len(plans.array)
            self._pass.attends_rounded = plans.attends_rounded

    def _call(self, function: Callable[[int], tuple[float, int] | None], rows: RowsOfPass) -> tuple[float, int] | None:
        own = self._pass
        own.num_threads = self._threads.current
        if rows is not self._rows:
            self._rows = rows
            own.spans, own.num_spans, own.num_rows = rows.spans, len(rows.spans), rows.num_rows
            own.rotary, own.num_rotaries = rows.rotary, rows.num_rotaries
            own.token_bytes = rows.token_bytes
        return function(self._pass_address)

    def _logits_of(self, head: "HeadRows", num_rows: int, are_wanted: bool) -> Tensor | None:
        """Tells the next call to run this head; returns the memory of its logits. None if they are not wanted and it
        finds the likeliest without."""
        self._pass.head = head.pointer
        if not are_wanted and head.has_bounds:
            self._pass.logits = None
            return None
        logits = torch.empty(num_rows, head.vocab_size)
        self._pass.logits = logits.data_ptr()
        return logits

    def _memory_of(self, tensor: Tensor) -> int:
        own = tensor.float().contiguous()
        self._kept.append(own)
        return own.data_ptr()


class Chosen(NamedTuple):
    """Float32 logits `[rows, vocab_size]`, and each row's token of the largest, the first of equal ones."""

    logits: Tensor | None
    """None if nobody wanted them and the head found the likeliest without."""
    likeliest: list[int]


class HeadRows:
    """The final norm and a head of one precision, whose logits are multiplied by `multiplier`."""

    def __init__(
        self,
        rows: NativeModel,
        head: NativeMatrix | NarrowHead,
        norm: Tensor,
        vocab_size: int,
        multiplier: float,
        more: RoughMatrix | HeadBounds | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.has_bounds = isinstance(more, HeadBounds)
        self._rows = rows
        struct, self._kept = head_struct(head, norm, vocab_size, multiplier, more)
        self.pointer = pointer(struct)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns float32 `[rows, vocab_size]` from bf16 `[rows, hidden_size]`."""
        logits = self._rows.run_head(hidden, self).logits
        assert logits is not None
        return logits
