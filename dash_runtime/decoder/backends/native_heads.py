"""The heads of native code: packs them, and says which one serves the rows of a pass.

Knows matrices and rows; knows no layers.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.heads import Head
from dash_runtime.layers.narrow_head import NUM_LIKELY, HeadMap, NarrowMatrices
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.shortlist import NUM_EXACT_TILES
from dash_runtime.linears.dense_linear import FullLinear, Linear, packed_words
from dash_runtime.native.head_struct import HeadBounds, NarrowHead, RoughMatrix
from dash_runtime.native.matrix import NativeMatrix, int8_errors, pack_native_matrix, pack_outputs, pack_rough_matrix
from dash_runtime.native.model import HeadRows, NativeModel

_MOST_ROUGH, _MOST_APART = 10, 16
"""If rows may share products, more than the first number take no rough head: each row reads other tiles of the exact
matrix again, and 64 rows read two thirds of it. More than the second number all take one head."""

_TOKENS_FOR_ROW = 20 * NUM_LIKELY
"""A narrow head is for one row for every so many tokens of the vocabulary: each row reads likely tokens of its own.
More rows take the head in INT4, if they may share products."""


class NativeHeads:
    """The heads of one decoder.

    Args:
        actions: the precisions that may be packed.
        shares_products: whether many rows may take another head than few.
    """

    def __init__(self, rows: NativeModel, actions: Sequence[Action], shares_products: bool) -> None:
        self._rows = rows
        self._actions = actions
        self._shares_products = shares_products
        self._heads: dict[Action, HeadRows] = {}
        self._matrices: dict[Action, NativeMatrix] = {}

    def make(
        self, precision: Action, weight: Tensor, linear: Linear, norm: RmsNorm, multiplier: float, loudest: Tensor
    ) -> Head | None:
        """Returns norm and head of that precision, or None if native code has none: FULL needs a matrix whose memory
        the library's product shares, and INT4 needs a matrix in FULL or INT8.

        The head in INT4 computes all logits, and those of the best tiles again with that other matrix. `loudest` is as
        in `shortlist.py`. The head in FULL finds the likeliest tokens in hardly more time than INT8 takes, if INT8 is
        packed.
        """
        if precision is not Action.INT4:
            matrix, bounds = self._matrix(precision, weight, linear), None
            if matrix is None:
                return None
            if precision is Action.FULL and (int8 := self._matrix(Action.INT8, weight, linear)) is not None:
                bounds = HeadBounds(int8, *int8_errors(FullLinear(weight)).tensors())
            return HeadRows(self._rows, matrix, norm.weight, len(weight), multiplier, bounds)
        matrices = (self._matrix(exact, weight, linear) for exact in (Action.FULL, Action.INT8))
        matrix = next((own for own in matrices if own is not None), None)
        if matrix is None:
            return None
        rough = RoughMatrix(pack_rough_matrix(FullLinear(weight), loudest), loudest, NUM_EXACT_TILES)
        return HeadRows(self._rows, matrix, norm.weight, len(weight), multiplier, rough)

    def narrow(self, weight: Tensor, of: HeadMap, norm: RmsNorm, multiplier: float) -> Head:
        """Returns norm and narrow head of the matrix `weight`."""
        matrices = NarrowMatrices.of(weight, of.widen)
        head = NarrowHead(
            narrow=pack_native_matrix(Action.INT8, FullLinear(of.narrow.to(weight))),
            rough=pack_native_matrix(Action.INT4, matrices.widened),
            rank=of.rank,
            mean=matrices.mean,
            offsets=of.offsets,
            rows=pack_outputs(FullLinear(weight)),
        )
        return HeadRows(self._rows, head, norm.weight, len(weight), multiplier)

    def _matrix(self, precision: Action, weight: Tensor, linear: Linear) -> NativeMatrix | None:
        if precision not in self._matrices:
            if precision not in self._actions or (precision is Action.FULL and packed_words(linear) is None):
                return None
            self._matrices[precision] = pack_native_matrix(precision, FullLinear(weight), linear)
        return self._matrices[precision]

    def keep(self, heads: Mapping[Action, Head]) -> None:
        """Takes the decoder's heads by precision, of which some are native."""
        self._heads = {precision: head for precision, head in heads.items() if isinstance(head, HeadRows)}

    def of(self, precisions: Sequence[Action], wants_logits: bool) -> HeadRows | None:
        """Returns the head for rows of these precisions; None if no single one serves them."""
        num_rows, precision, full = len(precisions), precisions[0], self._heads.get(Action.FULL)
        if full is not None and self._shares_products and num_rows > _MOST_ROUGH:
            if full.has_bounds and not wants_logits:
                return full  # the likeliest tokens alone take less there than all logits elsewhere
            if Action.INT8 in self._heads and not {Action.INT8, Action.FULL} & set(precisions):
                return self._heads[Action.INT8]
            if num_rows > _MOST_APART:
                return full
        if len(set(precisions)) > 1:
            return None
        head = self._heads.get(precision)
        if head is None or not self._shares_products or num_rows <= head.vocab_size // _TOKENS_FOR_ROW:
            return head
        return self._heads.get(Action.INT4, head) if precision is Action.SKIP else head
