"""The calls that take one row, or some rows of one sequence, through all layers; made once and used for every token.

Knows programs and tensors; knows no policies and no sequences.
"""

import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from ctypes import Array, addressof, c_double, c_int64, c_uint8, c_void_p, pointer
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.programs.program_cache import Program
from dash_runtime.programs.row_loop import (
    MOST_INPUTS,
    NUM_OWN_INPUTS,
    CallStruct,
    ExchangeStruct,
    RotaryStruct,
    RowLoop,
    RowStruct,
)

ProgramCall = tuple[Program, Sequence[Tensor]]
"""A program, and its inputs after the row's own: its state, keys, values, cosines and sines."""
LayerCalls = tuple[Mapping[Action, ProgramCall], Mapping[Action, ProgramCall]]
"""A layer's calls by action; and those that also decide the next layer."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Memory that programs which decide the next layer share with the loop (`traced_deciding.py`).

    `tensor` is float32: facts, of which the first `num_known` name the last action and the next is the cost spent; from
    `first_result` on, the number of the chosen one of `actions`, and a score for each.
    """

    tensor: Tensor
    num_known: int
    first_result: int
    actions: Sequence[Action]


@dataclass(frozen=True, slots=True)
class RowShape:
    """The rows' state, and by layer the window (0 for none) and which of the rotary tables it has."""

    num_rows: int
    hidden_size: int
    dtype: torch.dtype
    windows: Sequence[int]
    rotary_of: Sequence[int]


def can_be_called(calls: Sequence[LayerCalls]) -> bool:
    """Returns True if native code can make all these calls."""
    each = [call for layer in calls for by_action in layer for call in by_action.values()]
    return all(program.path is not None and len(inputs) <= MOST_INPUTS - NUM_OWN_INPUTS for program, inputs in each)


class RowCalls:
    """All layers' calls for one set of weights. Not reentrant: what they read and write is here.

    Args:
        exchange: the deciding programs'; None if there are none.

    Raises:
        RuntimeError: a program cannot be loaded once more.
    """

    def __init__(
        self, loop: RowLoop, shape: RowShape, calls: Sequence[LayerCalls], exchange: Exchange | None = None
    ) -> None:
        self._loop = loop
        self._kept = calls, exchange
        self._num_layers = num_layers = len(calls)
        self._hidden = [torch.empty(shape.num_rows, shape.hidden_size, dtype=shape.dtype) for _ in range(2)]
        self._rotary = (RotaryStruct * (max(shape.rotary_of) + 1))()
        self._plan = bytearray(num_layers)
        self._times = array("q", bytes(16 * num_layers))
        num_scores = 0 if exchange is None else len(exchange.actions)
        self._score_bytes = 4 * num_scores
        self._scores = bytearray(max(1, self._score_bytes * num_layers))
        self._layer_costs = (c_double * (max(Action) + 1))()

        handles: list[int] = []
        weakref.finalize(self, loop.delete, handles).atexit = False

        def handle(tensor: Tensor) -> int:
            handles.append(loop.handle(tensor))
            return handles[-1]

        row = self._row = RowStruct()
        row.torch = pointer(loop.torch)
        row.calls = _call_table(loop, calls, handle)
        row.num_layers, row.num_actions, row.num_rows = num_layers, len(Action), shape.num_rows
        state = self._hidden[0]
        row.dtype, row.element_bytes, row.hidden_bytes = loop.dtype(shape.dtype), state.element_size(), state.nbytes
        row.hidden[:] = [handle(own) for own in self._hidden]
        row.hidden_data[:] = [own.data_ptr() for own in self._hidden]
        row.windows, row.rotary_of, row.rotary = _numbers(shape.windows), _numbers(shape.rotary_of), self._rotary
        row.plan, row.scores = (addressof(c_uint8.from_buffer(own)) for own in (self._plan, self._scores))
        row.times = self._times.buffer_info()[0]
        if exchange is not None:
            sizes = exchange.num_known, exchange.first_result, num_scores
            numbers = exchange.tensor.data_ptr()
            row.exchange = pointer(ExchangeStruct(numbers, *sizes, _numbers(exchange.actions), self._layer_costs))

    def run(
        self,
        hidden: Tensor,
        memory: Tensor,
        num_tokens: int,
        tables: Sequence[tuple[Tensor, Tensor]],
        pinned: bytes,
        layer_costs: Mapping[Action, float],
    ) -> tuple[Tensor, bytes, dict[int, bytes], array]:
        """Runs all layers.

        Args:
            hidden: the first layer's input, `[rows, hidden_size]`.
            memory: keys and values from the sequence's first position on, `[num_layers, 2, positions, num_kv_heads,
                head_dim]`, in the state's dtype.
            num_tokens: positions that the last row attends to, its own among them.
            tables: the rows' cosines and sines, `[rows, 1, head_dim]` each.
            pinned: each layer's action; 0 for a layer that the program before decides.
            layer_costs: for the share of cost already spent.

        Returns:
            The output, which the next run overwrites; the actions that ran; the scores of each layer that was decided;
            and each layer's start and end, by `perf_counter_ns`.

        Raises:
            RuntimeError: a program failed.
        """
        row = self._row
        self._hidden[0].copy_(hidden)
        row.memory = memory.data_ptr()
        row.num_kv_heads, row.head_dim, row.num_tokens = memory.shape[3], memory.shape[4], num_tokens
        row.layer_bytes, row.values_bytes, row.token_bytes = (
            stride * row.element_bytes for stride in memory.stride()[:3]
        )
        for own, (cosines, sines) in zip(self._rotary, tables, strict=True):
            own.cosines, own.sines = cosines.data_ptr(), sines.data_ptr()
        row.pinned = (c_uint8 * self._num_layers).from_buffer_copy(pinned)
        for action, cost in layer_costs.items():
            self._layer_costs[action] = cost
        failed = self._loop.run(addressof(row))
        if failed:
            raise RuntimeError(f"the program of layer {failed - 1} failed")
        size = self._score_bytes
        scores = {
            layer: bytes(self._scores[layer * size : (layer + 1) * size])
            for layer, action in enumerate(pinned)
            if not action
        }
        return self._hidden[self._num_layers % 2], bytes(self._plan), scores, array("q", self._times)


def _numbers(numbers: Sequence[int]) -> "Array[c_int64]":
    return (c_int64 * len(numbers))(*numbers)


def _call_table(loop: RowLoop, calls: Sequence[LayerCalls], handle: Callable[[Tensor], int]) -> "Array[CallStruct]":
    """Returns the calls as `[layer][decides the next layer][action]`."""
    table = (CallStruct * (len(calls) * 2 * len(Action)))()
    for first, by_action in enumerate(by_action for layer in calls for by_action in layer):
        for action, (program, tensors) in by_action.items():
            assert program.path is not None
            own = table[first * len(Action) + action - 1]
            own.run, own.container = loop.container(program.path)
            own.inputs, own.num_inputs = (c_void_p * len(tensors))(*map(handle, tensors)), len(tensors)
    return table
