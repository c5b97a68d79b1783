"""The rows whose keys and values one layer projects in one pass: those that run it, and those that skipped it.

Knows sequences' positions and pending rows; knows no weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.pending_kv import MAX_PENDING

Tables = Callable[[slice | Tensor], tuple[Tensor, Tensor]]
"""Maps positions to cosines and sines `[positions, 1, head_dim]` of the layer's rotary embedding."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions of one sequence: `num_rows` rows of a pass or projection, from `first_row` on."""

    cache: SequenceCache
    start: int
    num_rows: int
    first_row: int

    @property
    def end(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True)
class Projection:
    """The rows that one layer projects in one pass."""

    hidden: Tensor
    """The layer's inputs, `[projected rows, hidden_size]`."""
    actions: Sequence[Action]
    """One per row; SKIP if only keys and values are needed. A skipped row has the action of the row that takes it
    along."""
    cosines: Tensor
    sines: Tensor
    spans: Sequence[Span]
    own_rows: slice | Tensor | None
    """The indices of the pass's own rows among the projected ones; None if they are the same rows. Skipped rows have no
    query; their index is arbitrary."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores the projected rows' keys and values, each `[projected rows, num_kv_heads, head_dim]`."""
        for span in self.spans:
            rows, positions = slice(span.first_row, span.first_row + span.num_rows), slice(span.start, span.end)
            span.cache.keys[layer][positions].copy_(keys[rows])
            span.cache.values[layer][positions].copy_(values[rows])


def project_row(span: Span, layer: int, action: Action, hidden: Tensor, tables: Tables) -> Projection | None:
    """Does the same as `project_rows` for one row. Makes no lists, since decoding one sequence is the common case."""
    pending = span.cache.pending
    count = len(pending[layer])
    if action is Action.SKIP:
        if pending.add(layer, hidden) < MAX_PENDING:
            return None
    elif not count:
        return Projection(hidden, (action,), *tables(slice(span.start, span.end)), (span,), None)
    else:
        pending.add(layer, hidden)
    start = span.start - count
    rows = torch.cat(pending.take(layer))
    positions = tables(slice(start, span.end))
    return Projection(
        rows, (action,) * (count + 1), *positions, (Span(span.cache, start, count + 1, 0),), slice(count, None)
    )


def project_rows(
    spans: Sequence[Span], layer: int, actions: Sequence[Action], hidden: Tensor, tables: Tables
) -> Projection | None:
    """Returns what the layer has to project now, or None if every row skips and may wait. Keeps waiting rows."""
    inputs: list[Tensor] = []
    labels: list[Action] = []
    projected_spans: list[Span] = []
    own_rows = [0] * len(actions)
    for span in spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        num_pending = len(span.cache.pending[layer])
        projected, own_labels = span.cache.pending.take_with(layer, hidden[rows].split(1), actions[rows])
        if projected:
            projected_spans.append(Span(span.cache, span.start - num_pending, len(projected), len(labels)))
        for place in range(num_pending, len(projected)):
            own_rows[span.first_row + place - num_pending] = len(labels) + place
        labels += own_labels
        inputs += projected
    if not labels:
        return None
    positions = torch.cat([torch.arange(own.start, own.end) for own in projected_spans]).to(hidden.device)
    places = torch.tensor(own_rows, device=hidden.device)
    return Projection(torch.cat(inputs), labels, *tables(positions), projected_spans, places)
