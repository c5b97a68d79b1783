"""The rows of one pass: which sequence each belongs to, where it stands, and what it may attend to.

A row is one token of one sequence. Decoding has one row per sequence; a prefill has many rows of one.
Knows caches and positions; knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.attention import attention, causal_mask
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.decoder.kv_cache import SequenceCache
from dash_runtime.decoder.pending_kv import MAX_PENDING, Projection, Stretch, late_actions
from dash_runtime.decoder.rotary import RotaryTable
from dash_runtime.programs.kv_blocks import attended_blocks


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


class Batch:
    """The rows of one pass through the decoder.

    Args:
        caches: one sequence cache per span.
        lengths: rows of each span; they follow what is cached already.
        compensations: one per span: what replaces a skipped layer in its rows.
        sliding_window: per layer, the latest positions it attends to, or None for all.
        row_block: attention takes so many rows of a span at once, from its first on. A row's sums depend on how many
            rows and positions are given with it, so that those of a block do not depend on what follows it.
        as_decoding: whether rows of one sequence, all in FULL, are to have the very numbers that they have where they
            are decoded one by one; only compiled layers tell these apart.
        is_prompt: whether these are rows of a prompt, of which one alone is to have the numbers that it has among
            others.
    """

    def __init__(
        self,
        caches: Sequence[SequenceCache],
        lengths: Sequence[int],
        rotary: RotaryTable,
        compensations: Sequence[Compensation],
        sliding_window: Sequence[int | None],
        row_block: int,
        as_decoding: bool = False,
        is_prompt: bool = False,
    ) -> None:
        self.spans: list[Span] = []
        first_row = 0
        for cache, length in zip(caches, lengths, strict=True):
            cache.check_room(cache.length + length)
            self.spans.append(Span(cache, cache.length, length, first_row))
            first_row += length
        self.num_rows = first_row
        is_one_each = self.num_rows == len(self.spans) and all(span.start > 0 for span in self.spans)
        self.is_decoding = is_one_each and not is_prompt
        """Whether every row is the only one of its sequence, has others before it and is not of a prompt."""
        self.is_as_decoding = as_decoding and len(self.spans) == 1 and self.spans[0].start > 0
        self.is_like_decoded = self.is_decoding or as_decoding
        """Whether each row is to have the numbers that it has where it is decoded alone."""
        self._row_block = row_block
        self._rotary = rotary
        self._sliding_window = sliding_window
        self._compensations = [
            compensation
            for compensation, span in zip(compensations, self.spans, strict=True)
            for _ in range(span.num_rows)
        ]
        self._shares_compensation = all(own is self._compensations[0] for own in self._compensations)
        self._stretches = [Stretch(span.cache, span.start, span.num_rows, span.first_row) for span in self.spans]
        self._cosines, self._sines = self._tables(self._stretches)
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._seen: dict[int, tuple[Sequence[Tensor], Sequence[Tensor]]] = {}
        self._blocks: dict[tuple[tuple[int, ...], int | None], list[Tensor]] = {}

    def projection(self, layer: int, actions: Sequence[Action], hidden: Tensor) -> Projection | None:
        """What the layer has to project now; None where every row skips and may wait. Rows that wait are kept."""
        if len(actions) == 1:
            return self._single_row_projection(layer, actions[0], hidden)
        waiting = [span.cache.pending[layer] for span in self.spans]
        if Action.SKIP not in actions and not any(waiting):
            return Projection(hidden, actions, self._cosines, self._sines, self._stretches, None)
        inputs: list[Tensor] = []
        labels: list[Action] = []
        stretches: list[Stretch] = []
        own_rows = [0] * self.num_rows
        for span, pending in zip(self.spans, waiting, strict=True):
            own_actions = actions[span.first_row : span.first_row + span.num_rows]
            projected = late_actions(len(pending), own_actions)
            rows = [*pending, *hidden[span.first_row : span.first_row + span.num_rows].split(1)]
            span.cache.pending[layer] = rows[len(projected) :]
            if projected:
                stretches.append(Stretch(span.cache, span.start - len(pending), len(projected), len(labels)))
            for place in range(len(pending), len(projected)):
                own_rows[span.first_row + place - len(pending)] = len(labels) + place
            labels += projected
            inputs += rows[: len(projected)]
        if not labels:
            return None
        places = torch.tensor(own_rows, device=hidden.device)
        return Projection(torch.cat(inputs), labels, *self._tables(stretches), stretches, places)

    def _single_row_projection(self, layer: int, action: Action, hidden: Tensor) -> Projection | None:
        """`projection` for one row, without its general case's lists: decoding one sequence is the common case."""
        span = self.spans[0]
        pending = span.cache.pending[layer]
        count = len(pending)
        if action is Action.SKIP:
            pending.append(hidden)
            if count + 1 < MAX_PENDING:
                return None
        elif not count:
            return Projection(hidden, (action,), self._cosines, self._sines, self._stretches, None)
        else:
            pending.append(hidden)
        span.cache.pending[layer] = []
        start = span.start - count
        return Projection(
            torch.cat(pending),
            (action,) * (count + 1),
            *self.tables(slice(start, span.end)),
            (Stretch(span.cache, start, count + 1, 0),),
            slice(count, None),
        )

    def _tables(self, stretches: Sequence[Stretch]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these positions, `[rows, 1, head_dim]`."""
        if len(stretches) == 1:
            positions: slice | Tensor = slice(stretches[0].start, stretches[0].start + stretches[0].num_rows)
        else:
            device = self._rotary.cosines.device
            positions = torch.cat([torch.arange(s.start, s.start + s.num_rows) for s in stretches]).to(device)
        return self.tables(positions)

    @cached_property
    def row_tables(self) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of each row, `[1, 1, head_dim]`."""
        return list(zip(self._cosines.split(1), self._sines.split(1), strict=True))

    def tables(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these positions, `[rows, 1, head_dim]`."""
        return self._rotary.cosines[positions], self._rotary.sines[positions]

    def seen(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[positions, num_kv_heads, head_dim]` that a row attends to, its own last; for passes of one
        sequence or of one row each."""
        window = self._sliding_window[layer]
        if row not in self._seen:  # sliced for all layers at once, which is a tenth of slicing for each
            span = self.spans[0 if len(self.spans) == 1 else row]
            self._seen[row] = span.cache.until(span.start + row - span.first_row + 1)
        keys, values = self._seen[row]
        if window is None:
            return keys[layer], values[layer]
        return keys[layer][-window:], values[layer][-window:]

    def seen_blocks(self, layer: int, rows: Sequence[int]) -> list[Tensor]:
        """What the program for several sequences' rows takes: keys and values of the layer in the sequences' pool
        (`kv_cache.CachePool`), the blocks that the rows attend to (`blocks.AttendedBlocks`), cosines and sines; for
        passes of one row each."""
        window = self._sliding_window[layer]
        key = (tuple(rows), window)
        if key not in self._blocks:
            spans = [self.spans[row] for row in rows]
            attended = attended_blocks([span.cache.start for span in spans], [span.start for span in spans], window)
            everyone = len(rows) == self.num_rows
            tables = (self._cosines, self._sines) if everyone else self.tables(torch.tensor([s.start for s in spans]))
            self._blocks[key] = [*attended.tensors(), *tables]
        pool = self.spans[rows[0]].cache.pool
        return [pool.key_blocks[layer], pool.value_blocks[layer], *self._blocks[key]]

    def take_pending(self, layer: int, rows: Sequence[int], num_own: int) -> list[Tensor]:
        """What the program for late keys and values takes: the layer's pending inputs of the rows' sequences, `[late
        rows, hidden_size]`, keys and values of the layer in the sequences' pool, which of its tokens these are, cosines
        and sines. The last `num_own` of each sequence are of this pass; none are pending any more."""
        inputs: list[Tensor] = []
        slots: list[int] = []
        positions: list[int] = []
        for row in rows:
            cache, end = self.spans[row].cache, self.spans[row].start + num_own
            own = range(end - len(cache.pending[layer]), end)
            inputs += cache.pending[layer]
            positions += own
            slots += range(cache.start + own.start, cache.start + end)
            cache.pending[layer] = []
        pool = self.spans[rows[0]].cache.pool
        of_one = slice(positions[0], positions[-1] + 1) if len(rows) == 1 else torch.tensor(positions)
        stored = pool.key_blocks[layer], pool.value_blocks[layer], torch.tensor(slots)
        return [torch.cat(inputs), *stored, *self.tables(of_one)]

    def sees_everything(self, layer: int) -> bool:
        """Whether the layer attends to all positions before a row."""
        return self._sliding_window[layer] is None

    def write(self, layer: int, projection: Projection, keys: Tensor, values: Tensor) -> None:
        """Stores the projected rows' keys and values, each `[projected rows, num_kv_heads, head_dim]`."""
        for stretch in projection.stretches:
            rows = slice(stretch.first_row, stretch.first_row + stretch.num_rows)
            positions = slice(stretch.start, stretch.start + stretch.num_rows)
            stretch.cache.keys[layer][positions].copy_(keys[rows])
            stretch.cache.values[layer][positions].copy_(values[rows])

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

    def compensate(self, layer: int, hidden: Tensor, rows: Sequence[int] | None) -> Tensor:
        """What replaces the layer's output for the given rows; `hidden` is theirs, `[given rows, hidden_size]`."""
        if self._shares_compensation:
            return self._compensations[0](layer, hidden)
        wanted = range(self.num_rows) if rows is None else rows
        parts = [self._compensations[row](layer, hidden[place : place + 1]) for place, row in enumerate(wanted)]
        return torch.cat(parts)

    def _attend_span(self, layer: int, span: Span, queries: Tensor) -> Tensor:
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
        window = self._sliding_window[layer]
        # What lies before the first row's window is sliced off, the rest is masked.
        first_key = 0 if window is None else max(0, span.start + 1 - window)
        keys, values = (own[layer][first_key : span.end] for own in (span.cache.keys, span.cache.values))
        mask = None
        if span.num_rows > 1:
            mask = self._masks.get((span.first_row, window))
            if mask is None:
                positions, seen = range(span.start, span.end), range(first_key, span.end)
                mask = causal_mask(positions, seen, window, queries.shape[1] // keys.shape[1], queries)
                self._masks[span.first_row, window] = mask
        return attention(queries, keys, values, mask)
