"""The rows of one pass: which sequence each belongs to, where it stands, and what it may attend to.

A row is one token of one sequence. Decoding has one row per sequence; a prefill has many rows of one.
Knows caches and positions; knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.decoder.kv_cache import SequenceCache
from dash_runtime.decoder.rotary import RotaryTable


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions of one sequence: `num_rows` rows of the pass, starting at `first_row`."""

    cache: SequenceCache
    start: int
    num_rows: int
    first_row: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows


def group_rows(actions: Sequence[Action]) -> list[tuple[Action, list[int] | None]]:
    """The rows by action, in ascending order of action; None where one action has all rows."""
    first = actions[0]
    if all(action is first for action in actions):
        return [(first, None)]
    return [(action, [row for row, own in enumerate(actions) if own is action]) for action in sorted(set(actions))]


class RowBatch:
    """The rows of one pass through the decoder.

    Args:
        caches: one sequence cache per span.
        lengths: rows of each span; they follow what is cached already.
        compensations: one per span: what replaces a skipped layer in its rows.
        sliding_window: per layer, the latest positions it attends to, or None for all.
    """

    def __init__(
        self,
        caches: Sequence[SequenceCache],
        lengths: Sequence[int],
        rotary: RotaryTable,
        compensations: Sequence[Compensation],
        sliding_window: Sequence[int | None],
    ) -> None:
        self.spans: list[Span] = []
        first_row = 0
        for cache, length in zip(caches, lengths, strict=True):
            cache.grow(cache.length + length)
            self.spans.append(Span(cache, cache.length, length, first_row))
            first_row += length
        self.num_rows = first_row
        self._sliding_window = sliding_window
        self._compensations = [
            compensation
            for compensation, span in zip(compensations, self.spans, strict=True)
            for _ in range(span.num_rows)
        ]
        self._shares_compensation = all(own is self._compensations[0] for own in self._compensations)
        if len(self.spans) == 1:
            span = self.spans[0]
            self.cosines = rotary.cosines[span.start : span.end]
            self.sines = rotary.sines[span.start : span.end]
        else:
            device = rotary.cosines.device
            positions = torch.cat([torch.arange(span.start, span.end) for span in self.spans]).to(device)
            self.cosines = rotary.cosines[positions]  # [rows, 1, head_dim]
            self.sines = rotary.sines[positions]
        self._masks: dict[tuple[int, int | None, int], Tensor | None] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores the rows' keys and values, each `[rows, num_kv_heads, head_dim]`."""
        for span in self.spans:
            rows = slice(span.first_row, span.first_row + span.num_rows)
            span.cache.keys[layer][0, :, span.start : span.end].copy_(keys[rows].transpose(0, 1))
            span.cache.values[layer][0, :, span.start : span.end].copy_(values[rows].transpose(0, 1))

    def commit(self) -> None:
        """Counts the rows as cached, once every layer has written them."""
        for span in self.spans:
            span.cache.length = span.end

    def attend(self, layer: int, queries: Tensor, rows: list[int] | None) -> Tensor:
        """Attention of the given rows over their own sequences, each over its own length only, so that a
        row's sum never depends on its neighbours.

        `queries` is `[all rows, num_heads, head_dim]`; returns `[given rows, num_heads * head_dim]`.
        """
        if len(self.spans) == 1:
            attended = self._attend_span(layer, self.spans[0], queries)
            return attended if rows is None else attended[rows]
        wanted = range(self.num_rows) if rows is None else rows
        parts: list[Tensor] = []
        for span in self.spans:
            span_rows = range(span.first_row, span.first_row + span.num_rows)
            offsets = [row - span.first_row for row in wanted if row in span_rows]
            if offsets:
                attended = self._attend_span(layer, span, queries[span_rows.start : span_rows.stop])
                parts.append(attended if len(offsets) == span.num_rows else attended[offsets])
        return torch.cat(parts)

    def compensate(self, layer: int, hidden: Tensor, rows: list[int] | None) -> Tensor:
        """What replaces the layer's output for the given rows; `hidden` is theirs, `[given rows, hidden_size]`."""
        if self._shares_compensation:
            return self._compensations[0](layer, hidden)
        wanted = range(self.num_rows) if rows is None else rows
        parts = [self._compensations[row](layer, hidden[place : place + 1]) for place, row in enumerate(wanted)]
        return torch.cat(parts)

    def _attend_span(self, layer: int, span: Span, queries: Tensor) -> Tensor:
        num_rows, num_heads, head_dim = queries.shape
        num_kv_heads = span.cache.keys[layer].shape[1]
        group = num_heads // num_kv_heads
        window = self._sliding_window[layer]
        # What lies before the first row's window is sliced off, the rest is masked.
        first_key = 0 if window is None else max(0, span.start + 1 - window)
        keys = span.cache.keys[layer][:, :, first_key : span.end]
        values = span.cache.values[layer][:, :, first_key : span.end]
        if num_rows == 1:
            # The query heads that share a key head become the rows of one attention: no expanded keys.
            folded = queries.view(1, num_kv_heads, group, head_dim)
            return functional.scaled_dot_product_attention(folded, keys, values).view(1, -1)
        folded = queries.view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        folded = folded.reshape(1, num_kv_heads, group * num_rows, head_dim)
        mask = self._mask(span, window, group, first_key, queries)
        attended = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        attended = attended.view(num_kv_heads, group, num_rows, head_dim).permute(2, 0, 1, 3)
        return attended.reshape(num_rows, num_heads * head_dim)

    def _mask(self, span: Span, window: int | None, group: int, first_key: int, queries: Tensor) -> Tensor | None:
        key = (span.first_row, window, group)
        if key not in self._masks:
            own = torch.arange(span.start, span.end, device=queries.device).unsqueeze(1)
            others = torch.arange(first_key, span.end, device=queries.device)
            visible = others <= own
            if window is not None:
                visible &= others > own - window
            bias = torch.zeros(visible.shape, dtype=queries.dtype, device=queries.device)
            self._masks[key] = bias.masked_fill_(~visible, float("-inf")).repeat(group, 1)
        return self._masks[key]
