"""The heads of native code, and which one serves the rows of a pass.

Knows matrices and rows; knows no layers.
"""

from collections.abc import Sequence

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.packed_model import PackedModel
from dash_runtime.layers.narrow_head import NUM_LIKELY, HeadMap
from dash_runtime.layers.shortlist import NUM_EXACT_TILES
from dash_runtime.native.head_struct import HeadBounds, NarrowHead, RoughMatrix
from dash_runtime.native.matrix import Int4Outputs, NativeMatrix
from dash_runtime.native.model import HeadRows, NativeModel

_MOST_ROUGH, _MOST_APART = 10, 16
"""If many rows may take another head than few, more than the first number take no rough head: each row reads other
tiles of the exact matrix again, and 64 rows read two thirds of it. More than the second number all take one head."""

_TOKENS_FOR_ROW = 5 * NUM_LIKELY
"""A narrow head is for one row for every so many tokens of the vocabulary: each row reads likely tokens of its own.
More rows take the head in INT4, if they may."""


class NativeHeads:
    """The heads of one decoder.

    Args:
        actions: the precisions that are offered.
        shares_heads: whether many rows may take another head than few.
    """

    def __init__(self, rows: NativeModel, actions: Sequence[Action], shares_heads: bool) -> None:
        self._rows = rows
        self._actions = actions
        self._shares_heads = shares_heads
        self._heads: dict[Action, HeadRows] = {}

    def make(
        self,
        packed: PackedModel,
        multiplier: float,
        head_map: HeadMap | None,
    ) -> dict[Action, HeadRows]:
        """Returns norm and head in each precision.

        The head in FULL finds the likeliest tokens in hardly more time than INT8 takes, if INT8 is offered. The one in
        INT4 computes all logits, and those of the best tiles again in FULL, or in INT8 if FULL is not offered: then
        there is a head in INT8 in any case.

        Args:
            head_map: that of the narrow head, the one in SKIP; None for no such head.
        """
        full = None
        if Action.FULL in self._actions:
            full = packed.matrix("head.FULL")
        norm, heads, size = packed.final_norm.weight, dict[Action, HeadRows](), packed.embedding.shape[0]

        def add(precision: Action, matrix: NativeMatrix | NarrowHead, more: RoughMatrix | HeadBounds | None) -> None:
            heads[precision] = HeadRows(self._rows, matrix, norm, size, multiplier, more)

        if full is not None:
            bounds = None
            if Action.INT8 in self._actions:
                bounds = HeadBounds(packed.matrix("head.INT8"), *packed.matrix("head.ERRORS").tensors())
            add(Action.FULL, full, bounds)
        if full is None or Action.INT8 in self._actions:
            add(Action.INT8, packed.matrix("head.INT8"), None)
        if Action.INT4 in self._actions:
            exact = packed.matrix("head.INT8") if full is None else full
            rough = RoughMatrix(packed.matrix("head.INT4"), packed.loudest, NUM_EXACT_TILES)
            add(Action.INT4, exact, rough)
        if head_map is not None:
            add(Action.SKIP, narrow_head_of(packed, head_map, full), None)
        self._heads = heads
        return heads

    def of(self, precisions: Sequence[Action], wants_logits: bool) -> HeadRows | None:
        """Returns the head for rows of these precisions; None if no single one serves them."""
        num_rows, precision, full = len(precisions), precisions[0], self._heads.get(Action.FULL)
        if self._shares_heads and num_rows > _MOST_ROUGH:
            if full is not None and full.has_bounds and not wants_logits:
                return full  # the likeliest tokens alone take less there than all logits elsewhere
            if Action.INT8 in self._heads and not {Action.INT8, Action.FULL} & set(precisions):
                return self._heads[Action.INT8]
            if full is not None and num_rows > _MOST_APART:
                return full
        if len(set(precisions)) > 1:
            return None
        head = self._heads.get(precision)
        if head is None or not self._shares_heads or num_rows <= head.vocab_size // _TOKENS_FOR_ROW:
            return head
        return self._heads.get(Action.INT4, head) if precision is Action.SKIP else head


def narrow_head_of(packed: PackedModel, head_map: HeadMap, full: NativeMatrix | None) -> NarrowHead:
    """Returns the narrow head that was packed for this map; `full` is the head in FULL, if there is one."""
    rows = packed.matrix("narrow.OUTPUTS")
    assert isinstance(rows, Int4Outputs)
    return NarrowHead(
        exact=packed.matrix("head.INT8") if full is None else full,
        narrow=packed.matrix("narrow.INT8"),
        rough=packed.matrix("narrow.INT4"),
        rank=head_map.rank,
        mean=packed.mean_row,
        offsets=head_map.offsets,
        rows=rows,
        repeated=packed.loudest,
        num_exact=NUM_EXACT_TILES,
    )
