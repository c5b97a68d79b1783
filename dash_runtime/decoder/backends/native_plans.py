"""Plans and rows of passes as native code is told of them. Knows batches and memory; knows no weights, no requests."""

from collections.abc import Collection, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.native_compensation import pack_for_rows
from dash_runtime.layers import kv_cache as cache_layout
from dash_runtime.layers.batch import Batch, PassKind, Span
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.rotary import RotaryTable
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.pass_rows import (
    CompensatedLayers,
    NativePlan,
    NativePlans,
    PlannerTable,
    PlannerTables,
    RowsOfPass,
    RowSpan,
)
from dash_runtime.native.policy import NativePolicy, RowDecisions
from dash_runtime.native.structs import LINE_BYTES, ROUNDED_TOKENS
from dash_runtime.passes import Network, PassPlan, RowPlan

_MOST_GROUPS = 64
# The cache lays out what native code fills in.
assert (cache_layout.BLOCK_TOKENS, cache_layout.LINE_BYTES) == (ROUNDED_TOKENS, LINE_BYTES)


class PassArguments(NamedTuple):
    """The arguments of a pass whose layers native code can run at once."""

    plans: NativePlans
    planner: PlannerTable | None


class PassTranslator:
    """Says the same of a pass to native code, and keeps it for the next pass with the same plan and batch.

    Args:
        actions: those that layers are packed for, SKIP included.
    """

    def __init__(self, library: NativeLibrary, num_layers: int, hidden_size: int, actions: Collection[Action]) -> None:
        self._library, self._num_layers, self._hidden_size = library, num_layers, hidden_size
        self._actions = actions
        self._compensated: dict[int, tuple[Compensation, CompensatedLayers | None]] = {}
        """By the compensation's id; the compensation is kept, so that nothing else gets it."""
        self._networks: WeakKeyDictionary[Network, NativePolicy] = WeakKeyDictionary()
        self._planners = PlannerTables()
        self._rows: WeakKeyDictionary[Batch, dict[tuple[int, ...] | None, tuple[int, RowsOfPass]]] = WeakKeyDictionary()
        """Rows of each batch, with the number of moves that they are of: a pass asks for them in every layer."""

    def rows_of(self, batch: Batch, rows: Sequence[int] | None = None) -> RowsOfPass:
        """Returns all rows, or some."""
        kept = self._rows.setdefault(batch, {})
        key = None if rows is None else tuple(rows)
        num_moves, own = kept.get(key, (0, None))
        if own is not None and num_moves == batch.num_moves:
            return own
        pieces = [(span, span.end, span.num_rows) for span in batch.spans] if rows is None else _pieces(batch, rows)
        if own is not None:
            own.move([end for _, end, _ in pieces])
            kept[key] = batch.num_moves, own
            return own
        if len(kept) == _MOST_GROUPS:
            kept.clear()
        each, first_row = [], 0
        for span, end, num_rows in pieces:
            each.append(_row_span(span.cache, end, first_row, num_rows))
            first_row += num_rows
        tables = list(dict.fromkeys(batch.rotary))
        rotary = [[_addresses(table, span) for table in tables] for span, _, _ in pieces]
        own = RowsOfPass(each, batch.spans[0].cache.pool.token_bytes, rotary)
        kept[key] = batch.num_moves, own
        return own

    def arguments(self, plan: PassPlan, batch: Batch) -> PassArguments | None:
        """Returns what is said of such passes; None if somebody has a part between their layers."""
        num_rows, rows = batch.num_rows, list(plan.rows)
        if any(row.network is None and len(row.pinned) < self._num_layers for row in rows):
            return None
        is_planned = plan.planner is not None and len(rows) > 1
        latencies = plan.planner.latencies if plan.planner is not None and is_planned else None
        if is_planned and latencies is None:
            return None
        compensated = [own for given in batch.compensations if (own := self.compensated_by(given)) is not None]
        if len(compensated) < num_rows:
            return None
        if len(rows) == 1 and not batch.skips_alike:
            rows *= num_rows
        if len(rows) > 1 and batch.kind is not PassKind.DECODE:
            return None
        pinned = [bytes(row.pinned.get(layer, 0) for layer in range(self._num_layers)) for row in rows]
        self.check(*batch.kv_actions, *(Action(own) for own in set(b"".join(pinned)) - {0}))
        skips = zip(compensated, batch.kv_actions, strict=True)
        each = zip(pinned, map(self._decisions, rows), skips, strict=False)
        plans = NativePlans([NativePlan(own, by, *skip) for own, by, skip in each], plan.attends_rounded)
        table = None if latencies is None else self._planners.get(latencies, num_rows)
        return PassArguments(plans, table)

    def compensated_by(self, compensation: Compensation) -> CompensatedLayers | None:
        """Returns the compensation for native code; None if it has none of this kind."""
        made = self._compensated.get(id(compensation))
        if made is None:
            layers = pack_for_rows(compensation, self._num_layers, self._hidden_size)
            made = self._compensated[id(compensation)] = compensation, layers
        return made[1]

    def check(self, *actions: Action) -> None:
        """Raises ValueError for an action without matrices: native code would read memory that is not there."""
        if missing := set(actions) - set(self._actions):
            raise ValueError(f"layers are not packed for {min(missing).name}")

    def _decisions(self, row: RowPlan) -> RowDecisions | None:
        if row.network is None:
            return None
        network = self._networks.get(row.network)
        if network is None:
            network = self._networks[row.network] = NativePolicy(self._library, row.network)
        assert row.facts is not None
        return RowDecisions(network, row.facts)


def _row_span(cache: SequenceCache, end: int, first_row: int, num_rows: int) -> RowSpan:
    span = RowSpan(cache.memories[0].data_ptr(), *cache.strides, end, first_row, num_rows)
    if (own := cache.rounded) is None:
        return span
    rounded, filled = own
    return span._replace(rounded=rounded.data_ptr(), rounded_bytes=rounded.stride(0), filled=filled.data_ptr())


def _addresses(table: RotaryTable, span: Span) -> tuple[int, int]:
    """Returns the addresses of cosines and sines of a sequence's first position."""
    first = table.first_row(span.cache.reserved_tokens)
    return table.cosines[first].data_ptr(), table.sines[first].data_ptr()


def _pieces(batch: Batch, rows: Sequence[int]) -> list[tuple[Span, int, int]]:
    """Returns the parts of spans that some rows are: the span, the number of its positions up to there, and how many
    rows they are."""
    pieces: list[tuple[Span, int, int]] = []
    number, before = 0, -2
    for row in rows:
        while row >= batch.spans[number].first_row + batch.spans[number].num_rows:
            number += 1
        span = batch.spans[number]
        end = span.start + row - span.first_row + 1
        if row == before + 1 and pieces and pieces[-1][0] is span:
            pieces[-1] = span, end, pieces[-1][2] + 1
        else:
            pieces.append((span, end, 1))
        before = row
    return pieces
