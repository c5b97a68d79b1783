"""Decoding on CUDA: one graph for each layer, action and number of rows, attention included. Has not been run on a GPU.

The host only says which graph comes next. Knows layers and rows; knows no policies and no requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.decoder.backends.loop import LayerLoop, LoopEnds
from dash_runtime.devices import Device
from dash_runtime.devices.cuda_graphs import Replay, collected_garbage
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.embedding import PlainEmbedding
from dash_runtime.layers.heads import Head
from dash_runtime.layers.kv_cache import CachePool
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.layers.layer_body import after_attention, before_attention, split_heads
from dash_runtime.layers.static_rows import StaticRows
from dash_runtime.model_config import ModelConfig

NUM_ROWS = (1, 2, 4, 8, 16, 32)
"""The rows of graphs. A pass runs the smallest that has room for it."""
_SHORTEST_CONTEXT = 1024
_CONTEXT_STEP = 8
"""FlashAttention shares a row's keys between blocks by the most that there may be. One bound for all contexts would
share short ones badly, so there is one for each factor of this."""


class _Kernel(NamedTuple):
    """The work of a layer's graph: `action` for the rows that run, a compensation for those that skip."""

    layer: int
    action: Action
    """SKIP if all rows skip."""
    kv_action: Action
    """Projects keys and values: `action`, unless all rows skip."""
    compensation: int | None
    """Its id; None if all rows run."""


@dataclass(frozen=True, slots=True)
class _Beginning:
    has_tokens: bool


@dataclass(frozen=True, slots=True)
class _Head:
    precision: Action


_Work = _Kernel | _Beginning | _Head


class _Size(NamedTuple):
    num_rows: int
    max_length: int
    """0 where nothing is attended to."""


class CudaBackend(LayerLoop):
    """Replays a graph for each layer, and one each for a pass's beginning and for the head.

    Rows that run a layer have to have one action (`engine.planner.HighestAction` sees to it), and those that skip it
    one compensation; all else runs eagerly. Keys and values of a row that skips beside rows that run come from their
    product.

    Args:
        layers: all of them, packed for few rows.
        own_layers: those that lie on the device.
        embed: None if layer 0 is not among them.
        eager: runs what has no graph.
        device: makes the graphs.
    """

    def __init__(
        self,
        ends: LoopEnds,
        config: ModelConfig,
        layers: Sequence[DecoderLayer],
        own_layers: Sequence[int],
        embed: PlainEmbedding | None,
        heads: Mapping[Action, Head],
        eager: EagerBackend,
        device: Device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(ends)
        self._config = config
        self._layers = layers
        self._own_layers = own_layers
        self._embed = embed
        self._heads = heads
        self._eager = eager
        self._device = device
        self._capture = device.make_capture()
        self._dtype = dtype
        self._has_mixture = any(config.mixture_of(layer) is not None for layer in range(config.num_layers))
        self._graphs: WeakKeyDictionary[CachePool, dict[tuple[_Work, _Size], Replay]] = WeakKeyDictionary()
        self._compensations: dict[int, Compensation] = {}  # kept, so that nothing else gets their ids
        self._rows: StaticRows | None = None
        self._batch: Batch | None = None
        self._size = _Size(0, 0)
        self.may_capture = True

    @property
    def num_graphs(self) -> int:
        """Graphs of all pools that are in use."""
        return sum(map(len, self._graphs.values()))

    @property
    def graphs(self) -> "CudaBackend":
        return self

    def takes(self, batch: Batch) -> bool:
        if batch is self._batch:
            return True
        if self._has_mixture or batch.num_rows > NUM_ROWS[-1]:
            return False
        return all(table.query_factors is None for table in batch.rotary)

    def static_input(self, layer: int, hidden: Tensor) -> Tensor | None:
        if self._rows is None or hidden is not self._rows.state(layer, len(hidden)):
            return None
        return self._rows.state(layer, _with_room_for(len(hidden)))

    def first_input(self, token_ids: Sequence[int], batch: Batch) -> Tensor:
        if self._embed is None:
            return super().first_input(token_ids, batch)
        return self._begin(batch, token_ids).state(0, batch.num_rows)

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        if batch is self._batch and self._rows is not None:
            rows = self._rows
        else:
            rows = self._begin(batch, ())
            rows.state(layer, batch.num_rows).copy_(hidden)
        output = rows.state(layer + 1, batch.num_rows)
        kernel = self._kernel_of(layer, actions, batch)
        if kernel is None:
            return output.copy_(self._eager.run_layer(layer, actions, hidden, batch))
        if kernel.compensation is not None and kernel.action is not Action.SKIP:
            rows.write_skips(layer, [action is Action.SKIP for action in actions])
        self._replay(batch, kernel, self._size)
        return output

    def logits(self, hidden: Tensor, precisions: Sequence[Action]) -> Tensor:
        batch, rows = self._batch, self._rows
        first = precisions[0]
        if batch is None or rows is None or hidden is not rows.state(self._config.num_layers, len(hidden)):
            return self._eager.logits(hidden, precisions)
        if any(precision is not first for precision in precisions):
            return self._eager.logits(hidden, precisions)
        self._replay(batch, _Head(first), self._size)
        return rows.logits[: len(hidden)]

    def graph_sizes(self, max_rows: int) -> Sequence[int]:
        return () if self._has_mixture else [size for size in NUM_ROWS if size // 2 < max_rows]

    def context_sizes(self, longest: int) -> Sequence[int]:
        sizes = [_SHORTEST_CONTEXT]
        while sizes[-1] < longest:
            sizes.append(sizes[-1] * _CONTEXT_STEP)
        return sizes

    def prepare(self, batch: Batch, layer: int, context: int) -> None:
        if not self.takes(batch):
            return
        own = batch.compensations[0]
        self._compensations[id(own)] = own
        running = self._layers[layer].linears
        kernels = [_Kernel(layer, action, action, None) for action in running]
        if batch.num_rows > 1:
            kernels += [kernel._replace(compensation=id(own)) for kernel in kernels]
        kernels += [_Kernel(layer, Action.SKIP, action, id(own)) for action in running]
        with collected_garbage():
            self._begin(batch, () if self._embed is None else [0] * batch.num_rows)
            works: list[_Work] = [*kernels, *map(_Head, self._heads)]
            for work in works:
                self._find(batch, work, _Size(self._size.num_rows, context))

    def _begin(self, batch: Batch, token_ids: Sequence[int]) -> StaticRows:
        """Uploads where the rows are; with token ids, looks these up as well."""
        if self._rows is None:
            own = self._own_layers
            tables = [table if layer in own else None for layer, table in enumerate(batch.rotary)]
            self._rows = StaticRows(self._config, self._device, self._dtype, NUM_ROWS[-1], tables)
        longest = max(span.end for span in batch.spans)
        self._batch, self._size = batch, _Size(_with_room_for(batch.num_rows), self.context_sizes(longest)[-1])
        self._rows.write(batch, token_ids)
        self._replay(batch, _Beginning(bool(token_ids)), self._size)
        return self._rows

    def _kernel_of(self, layer: int, actions: Sequence[Action], batch: Batch) -> _Kernel | None:
        """Returns what the layer's graph has to run; None if no graph can."""
        running = set(actions)
        if Action.SKIP not in running:
            return _Kernel(layer, actions[0], actions[0], None) if len(running) == 1 else None
        skipping = [row for row, action in enumerate(actions) if action is Action.SKIP]
        own = batch.compensations[skipping[0]]
        if len(running) > 2 or any(batch.compensations[row] is not own for row in skipping):
            return None
        self._compensations[id(own)] = own
        action = max(running)
        kv_action = max(batch.kv_actions) if action is Action.SKIP else action
        return _Kernel(layer, action, kv_action, id(own))

    def _replay(self, batch: Batch, work: _Work, size: _Size) -> None:
        self._find(batch, work, size)()

    def _find(self, batch: Batch, work: _Work, size: _Size) -> Replay:
        """Returns what launches this work: its graph, which is captured if it is not there and that may be now."""
        pool = batch.spans[0].cache.pool
        graphs = self._graphs.setdefault(pool, {})
        if not isinstance(work, _Kernel) or work.action is Action.SKIP:
            size = size._replace(max_length=0)
        replay = graphs.get((work, size))
        if replay is None:
            assert self._rows is not None
            run = partial(self._run, self._rows, work, pool, size)
            if not self.may_capture:
                return run
            replay = graphs[work, size] = self._capture(run)
        return replay

    # What graphs do.

    def _run(self, rows: StaticRows, work: _Work, pool: CachePool, size: _Size) -> None:
        match work:
            case _Beginning(has_tokens):
                self._run_beginning(rows, has_tokens, size)
            case _Head(precision):
                hidden = rows.state(self._config.num_layers, size.num_rows)
                rows.logits[: size.num_rows].copy_(self._heads[precision](hidden))
            case _:
                self._run_layer(rows, work, pool, size)

    def _run_beginning(self, rows: StaticRows, has_tokens: bool, size: _Size) -> None:
        rows.upload()
        if has_tokens:
            assert self._embed is not None
            rows.state(0, size.num_rows).copy_(self._embed.look_up(rows.token_ids(size.num_rows)))

    def _run_layer(self, rows: StaticRows, kernel: _Kernel, pool: CachePool, size: _Size) -> None:
        layer, config, weights = kernel.layer, self._config, self._layers[kernel.layer]
        hidden, output = (rows.state(place, size.num_rows) for place in (layer, layer + 1))
        is_run = kernel.action is not Action.SKIP
        product = weights.linears[kernel.action].query_key_value if is_run else weights.key_values[kernel.kv_action]
        num_queries = config.num_heads if is_run else 0
        fused = product(before_attention(weights, hidden))
        rotation = rows.rotation(layer, size.num_rows)
        queries, *written = split_heads(config, weights, fused, num_queries, *rotation)
        cached = pool.layers[layer]
        for memory, own in zip(cached, written, strict=True):
            memory.index_copy_(0, rows.slots(size.num_rows), own)
        if is_run:
            where, scale = rows.attended(size.num_rows, size.max_length), config.block.attention_scale
            attended = self._device.attend_rows(queries, *cached, where, scale, config.sliding_window[layer])
            result = after_attention(config.block, weights, weights.linears[kernel.action], hidden, attended)
        if kernel.compensation is not None:
            compensated = self._compensations[kernel.compensation](layer, hidden)
            result = (
                torch.where(rows.uploaded_skips(layer, size.num_rows), compensated, result) if is_run else compensated
            )
        output.copy_(result)


def _with_room_for(num_rows: int) -> int:
    return next(size for size in NUM_ROWS if size >= num_rows)
