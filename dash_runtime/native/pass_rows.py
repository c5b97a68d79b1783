"""The rows of a call of native code: where they stand, and what decides their layers. Knows memory; runs nothing."""

from collections.abc import Sequence
from ctypes import addressof, c_double, c_uint8, pointer
from typing import NamedTuple

from torch import Tensor

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.native.head_struct import packed_struct
from dash_runtime.native.matrix import Int8NativeMatrix
from dash_runtime.native.policy import RowDecisions
from dash_runtime.native.structs import (
    CompensationStruct,
    PlannerStruct,
    RotaryStruct,
    RowPlanStruct,
    SpanStruct,
)


class RowSpan(NamedTuple):
    """Consecutive rows of one sequence: its memory of layer 0, from its first position on, the bytes from layer to
    layer and from keys to values, how many positions it has with them, and which rows they are. Then, if rows of
    rounded layers are to attend to rounded keys and values, memory for these, the bytes from layer to layer, and by
    layer the bounds of the positions that have them, int64 `[num_layers, 2]`."""

    memory: int
    layer_bytes: int
    values_bytes: int
    num_tokens: int
    first_row: int
    num_rows: int
    rounded: int | None = None
    rounded_bytes: int = 0
    filled: int | None = None


class RowsOfPass:
    """The rows of one call.

    Args:
        token_bytes: from token to token of all sequences' memory.
        rotary: for each span, the addresses of cosines and sines `[positions, head_dim]` by the number of the rotary
            table. Their memory is the caller's.
    """

    def __init__(
        self,
        spans: Sequence[RowSpan],
        token_bytes: int,
        rotary: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        self.spans = (SpanStruct * len(spans))(*[SpanStruct(*own) for own in spans])
        self.num_rows = spans[0].num_rows if len(spans) == 1 else sum(own.num_rows for own in spans)
        self.token_bytes = token_bytes
        self.num_rotaries = len(rotary[0])
        tables = [RotaryStruct(*table) for own in rotary for table in own]
        self.rotary = (RotaryStruct * len(tables))(*tables)

    def move(self, num_tokens: Sequence[int]) -> None:
        """Moves the rows of each span within its sequence, which has so many positions with them."""
        for span, count in zip(self.spans, num_tokens, strict=True):
            span.num_tokens = count


class LowRankMap(NamedTuple):
    """A map from states to features, `[rank, hidden_size]`, and one back, `[hidden_size, rank]`."""

    narrow: Int8NativeMatrix
    widen: Int8NativeMatrix


class CompensatedLayers:
    """The replacement of each layer's output where it is skipped, for the native code.

    Args:
        vectors: by layer; `[2 * hidden_size]`, a factor and an offset per channel, or with maps `[hidden_size]`, the
            offsets. None for layers that the caller compensates.
        maps: by layer, all of one rank; None for factors.
    """

    def __init__(
        self, num_layers: int, vectors: Sequence[Tensor] | None, maps: Sequence[LowRankMap] | None = None
    ) -> None:
        self.array = (CompensationStruct * num_layers)()
        self._kept: list[object] = []
        for layer, struct in enumerate(self.array):
            if vectors is None:
                continue
            own = vectors[layer].float().contiguous()
            struct.vectors = own.data_ptr()
            self._kept.append(own)
            if maps is not None:
                narrow, widen = maps[layer]
                struct.rank = len(narrow.scales)
                struct.narrow, kept_narrow = packed_struct(narrow, len(own))
                struct.widen, kept_widen = packed_struct(widen, struct.rank)
                self._kept += [kept_narrow, kept_widen]


class NativePlan(NamedTuple):
    """The plan of a row: `pinned` by layer, 0 for one that `decisions` decide; and the replacement of those that
    it skips, whose keys and values are of precision `kv_action`."""

    pinned: bytes
    decisions: RowDecisions | None
    compensation: CompensatedLayers
    kv_action: Action


class NativePlans:
    """The plans of a call's rows: of each row, or one for all.

    Args:
        attends_rounded: whether rows attend in FULL as rounded layers do.
    """

    def __init__(self, plans: Sequence[NativePlan], attends_rounded: bool = False) -> None:
        self.attends_rounded = attends_rounded
        self._kept, self._num_layers = list(plans), len(plans[0].pinned)
        self.pinned = b"".join(plan.pinned for plan in plans)
        self._pinned, self._ran = bytearray(self.pinned), bytearray(len(self.pinned))
        pinned, ran = (addressof(c_uint8.from_buffer(memory)) for memory in (self._pinned, self._ran))
        self.array = (RowPlanStruct * len(plans))()
        for place, (struct, plan) in enumerate(zip(self.array, plans, strict=True)):
            first = place * self._num_layers
            struct.pinned, struct.plan = pinned + first, ran + first
            if plan.decisions is not None:
                struct.decisions = plan.decisions.struct
            struct.compensations, struct.kv_action = plan.compensation.array, plan.kv_action

    def pin(self, layer: int, action: Action, compensation: CompensatedLayers, kv_action: Action) -> None:
        """Pins a layer of the only plan otherwise."""
        self._pinned[layer] = action
        kept = self._kept[0]
        if compensation is not kept.compensation or kv_action is not kept.kv_action:
            self._kept[0] = kept._replace(compensation=compensation, kv_action=kv_action)
            self.array[0].compensations, self.array[0].kv_action = compensation.array, kv_action

    @property
    def num_score_bytes(self) -> int:
        """The size of the scores with which the only plan decides; 0 if it decides nothing."""
        decisions = self._kept[0].decisions
        return 0 if decisions is None else len(decisions.scores)

    def ran(self, num_rows: int) -> list[bytes]:
        """Returns the actions of the last call, by row and layer."""
        if len(self.array) == 1:
            return [bytes(self._ran)] * num_rows
        firsts = range(0, len(self._ran), self._num_layers)
        return [bytes(self._ran[first : first + self._num_layers]) for first in firsts]

    def scores(self, row: int) -> bytes | None:
        """Returns the scores with which the last call decided a row's layers; None if it decided none."""
        decisions = self._kept[row if len(self._kept) > 1 else 0].decisions
        return None if decisions is None else decisions.scores


class PlannerTable:
    """A table by which rows of a pass agree on actions: for up to `most_rows`."""

    def __init__(self, latencies: LatencyTable, most_rows: int) -> None:
        self._seconds = (c_double * (len(Action) * (most_rows + 1)))(
            *(
                latencies.cost(action, count) if action in latencies.seconds else float("inf")
                for action in sorted(Action)
                for count in range(most_rows + 1)
            )
        )
        self.pointer = pointer(PlannerStruct(self._seconds, most_rows, latencies.split_seconds))


class PlannerTables:
    """The tables of the latest latencies, by number of rows."""

    def __init__(self) -> None:
        self._latencies: LatencyTable | None = None
        self._tables: dict[int, PlannerTable] = {}

    def get(self, latencies: LatencyTable, num_rows: int) -> PlannerTable:
        """Returns the table for so many rows."""
        if latencies is not self._latencies:
            self._latencies, self._tables = latencies, {}
        if num_rows not in self._tables:
            self._tables[num_rows] = PlannerTable(latencies, num_rows)
        return self._tables[num_rows]
