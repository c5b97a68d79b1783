"""Captures the graphs of decoding before requests need them, in pieces that each take little time.

Knows a decoder, a lane and policies; knows no sequences and no requests.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices.cuda_graphs import collected_garbage
from dash_runtime.engine.decider import Decider, plan_of
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.later import Piece
from dash_runtime.engine.planner import HighestAction
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.kv_cache import CachePool
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Token

_TOKENS_OF_ROW = 2
"""A row has one position behind it, and writes the next."""


class GraphWork:
    """The pieces of work; none where there are no graphs. A piece raises CaptureFailed if the device cannot record one.

    Args:
        pool: the one whose rows the graphs decode. A piece takes what it needs of it, and gives that back empty.
        max_rows: the most rows that decode together.
        longest: the most positions that a row can have.
    """

    def __init__(self, decoder: Decoder, lane: Lane, pool: CachePool, max_rows: int, longest: int) -> None:
        self._decoder = decoder
        self._lane = lane
        self._pool = pool
        graphs = decoder.graphs if pool.total_tokens >= _TOKENS_OF_ROW else None
        self._sizes: Sequence[int] = () if graphs is None else graphs.graph_sizes(max_rows)
        self.contexts: Sequence[int] = () if graphs is None else graphs.context_sizes(longest)
        """The numbers of positions that have graphs of their own, ascending."""

    def layers(self, compensation: Compensation, context: int) -> Iterator[Piece]:
        """Yields a piece for each number of rows and each layer: its graphs for rows of up to `context` positions."""
        for num_rows in self._sizes:
            for layer in range(self._decoder.num_layers):
                yield partial(self._capture_layer, compensation, context, num_rows, layer)

    def decisions(self, policy: LearnedPolicy) -> Iterator[Piece]:
        """Yields a piece for each number of rows: all of the policy's graphs."""
        for num_rows in self._sizes:
            yield partial(self._decide, policy, num_rows)

    def _capture_layer(self, compensation: Compensation, context: int, num_rows: int, layer: int) -> None:
        graphs = self._decoder.graphs
        assert graphs is not None
        with self._batch(num_rows, compensation, self._decoder.highest) as batch:
            graphs.prepare(batch, layer, context)

    def _decide(self, policy: LearnedPolicy, num_rows: int) -> None:
        """Runs a pass that asks the policy: what has no graph yet gets one."""
        with self._batch(num_rows, policy.compensation, policy.kv_action) as batch:
            count = batch.num_rows
            tokens = [Token(row, 1, 0.0) for row in range(count)]
            decider = Decider(policy, self._lane, range(count), tokens, policy.costs, count)
            self._decoder.run_pass(plan_of([decider], HighestAction()), [0] * count, batch)

    @contextmanager
    def _batch(self, num_rows: int, compensation: Compensation, kv_action: Action) -> Iterator[Batch]:
        """Yields so many rows, or as many as the pool has room for."""
        caches = [cache for _ in range(num_rows) if (cache := self._pool.reserve(_TOKENS_OF_ROW)) is not None]
        assert caches, "the engine is not idle"
        for cache in caches:
            cache.length = 1
        count = len(caches)
        own = [compensation] * count, [kv_action] * count
        try:
            with torch.inference_mode(), collected_garbage():
                yield self._decoder.batch(PassKind.DECODE, caches, [1] * count, *own)
        finally:
            for cache in caches:
                cache.length = _TOKENS_OF_ROW  # so that what was written is cleared
                self._pool.release(cache)
