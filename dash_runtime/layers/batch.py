"""The rows of a pass: which sequence each belongs to, where it stands, and what it may attend to.

A row is one token of one sequence. Knows caches and positions; knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.attention import attention, causal_mask
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.rotary import RotaryTable
from dash_runtime.model_config import ModelConfig

_T = TypeVar("_T")


class PassKind(StrEnum):
    """The purpose of a pass. It decides what a row's bits may depend on."""

    PREFILL = "prefill"
    """Rows of prompts, or of whole texts under teacher forcing. A row has the same bits in every pass that begins at a
    multiple of the row block, however long the pass is."""
    DECODE = "decode"
    """One row per sequence, each with positions before it."""
    VERIFY = "verify"
    """Several rows per sequence. In a pass of one sequence each row has the same bits as when decoded."""


@dataclass(slots=True)
class Span:
    """Consecutive positions of one sequence: `num_rows` rows of a pass, from `first_row` on."""

    cache: SequenceCache
    start: int
    num_rows: int
    first_row: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows


class Batch:
    """The rows of a pass through the decoder.

    Args:
        caches: one sequence cache per span.
        lengths: rows of each span; they follow what is cached already.
        compensations: one per span; it replaces a skipped layer in the span's rows.
        kv_actions: one per span: the action whose kernel projects keys and values of the span's skipped rows.
        rotary: one table per layer.
        row_block: attention takes at most this many rows of a span at once, counted from its first row. A row's sums
            depend on the rows and positions passed with it, so a block's sums do not depend on what follows it.
    """

    def __init__(
        self,
        kind: PassKind,
        caches: Sequence[SequenceCache],
        lengths: Sequence[int],
        compensations: Sequence[Compensation],
        kv_actions: Sequence[Action],
        config: ModelConfig,
        rotary: Sequence[RotaryTable],
        row_block: int,
    ) -> None:
        self.kind = kind
        self.spans: list[Span] = []
        first_row = 0
        for cache, length in zip(caches, lengths, strict=True):
            cache.check_room(cache.length + length)
            self.spans.append(Span(cache, cache.length, length, first_row))
            first_row += length
        self.num_rows = first_row
        assert kind is PassKind.PREFILL or all(span.start > 0 for span in self.spans)
        assert kind is not PassKind.DECODE or self.num_rows == len(self.spans)
        self._row_block = row_block
        self._attention_scale = config.block.attention_scale
        self.rotary = rotary
        self.sliding_window = config.sliding_window
        self.compensations = self._by_row(compensations)
        self.kv_actions = self._by_row(kv_actions)
        self._shares_compensation = all(own is self.compensations[0] for own in self.compensations)
        self.skips_alike = self._shares_compensation and len(set(kv_actions)) == 1
        """True if all rows skip layers in the same way."""
        self._tables: dict[RotaryTable, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int | None, torch.device], Tensor] = {}
        self.num_moves = 0
        """The number of times that it moved on."""
        self.is_timed = False
        """True if layers' exact times are wanted, which cost a little on a device that only queues work."""

    def _by_row(self, by_span: Sequence[_T]) -> list[_T]:
        return [own for own, span in zip(by_span, self.spans, strict=True) for _ in range(span.num_rows)]

    def tables(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of all rows, `[rows, 1, head_dim]`."""
        table = self.rotary[layer]
        if table not in self._tables:
            firsts = [_first_row(table, span) for span in self.spans]
            if len(self.spans) == 1:
                rows: slice | Tensor = slice(firsts[0], firsts[0] + self.num_rows)
            else:
                ranges = [
                    torch.arange(first, first + span.num_rows) for first, span in zip(firsts, self.spans, strict=True)
                ]
                rows = torch.cat(ranges).to(table.cosines.device)
            self._tables[table] = table.at(rows)
        return self._tables[table]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores all rows' keys and values, each `[rows, num_kv_heads, head_dim]`."""
        for span in self.spans:
            rows, positions = slice(span.first_row, span.first_row + span.num_rows), slice(span.start, span.end)
            span.cache.keys[layer][positions].copy_(keys[rows])
            span.cache.values[layer][positions].copy_(values[rows])

    def move_on(self) -> None:
        """Makes this the batch of the rows that follow what is cached now, for another pass of the same sequences."""
        self.num_moves += 1
        for span in self.spans:
            span.start = span.cache.length
            span.cache.check_room(span.end)
        self._tables.clear()
        self._masks.clear()

    def commit(self, num_passes: int = 1) -> None:
        """Counts the rows as cached, of so many passes one after another. To be called once every layer has run."""
        for span in self.spans:
            span.cache.length = span.end + (num_passes - 1) * span.num_rows

    def attend(self, layer: int, queries: Tensor, is_run: Sequence[bool]) -> Tensor:
        """Attends with rows, each over its own sequence only, so that its sum never depends on neighbours.

        `queries` is `[rows, num_heads, head_dim]`; returns `[rows, num_heads * head_dim]`. Rows that do not run the
        layer (`is_run`) hold anything.
        """
        parts: list[Tensor] = []
        for span in self.spans:
            own = slice(span.first_row, span.first_row + span.num_rows)
            parts.append(self._attend_span(layer, span, queries[own]) if any(is_run[own]) else queries[own].flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def compensate(self, layer: int, hidden: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Returns the replacement of the layer's output for the given rows, from their `hidden`, `[given rows,
        hidden_size]`."""
        if self._shares_compensation:
            return self.compensations[0](layer, hidden)
        wanted = range(self.num_rows) if rows is None else rows
        parts = [self.compensations[row](layer, hidden[place : place + 1]) for place, row in enumerate(wanted)]
        return torch.cat(parts)

    def _attend_span(self, layer: int, span: Span, queries: Tensor) -> Tensor:
        factors = self.rotary[layer].query_factors
        if factors is not None:
            queries = queries * factors[span.start : span.end]
        if span.num_rows <= self._row_block:
            return self._attend_block(layer, span, queries)
        parts = queries.split(self._row_block)
        firsts = range(0, span.num_rows, self._row_block)
        blocks = [
            Span(span.cache, span.start + first, len(part), span.first_row + first)
            for first, part in zip(firsts, parts, strict=True)
        ]
        return torch.cat([self._attend_block(layer, *own) for own in zip(blocks, parts, strict=True)])

    def _attend_block(self, layer: int, span: Span, queries: Tensor) -> Tensor:
        window = self.sliding_window[layer]
        # Keys before the first row's window are sliced off. Those that only other rows see are masked.
        first_key = 0 if window is None else max(0, span.start + 1 - window)
        keys, values = (own[layer][first_key : span.end] for own in (span.cache.keys, span.cache.values))
        mask = None
        if span.num_rows > 1:
            key = span.first_row, window, queries.device
            mask = self._masks.get(key)
            if mask is None:
                positions, seen = range(span.start, span.end), range(first_key, span.end)
                mask = causal_mask(positions, seen, window, queries.shape[1] // keys.shape[1], queries)
                self._masks[key] = mask
        return attention(queries, keys, values, mask, self._attention_scale)


def _first_row(table: RotaryTable, span: Span) -> int:
    """Returns the table's row of a span's first position."""
    return table.first_row(span.cache.reserved_tokens) + span.start
