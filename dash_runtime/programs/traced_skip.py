"""The compiled programs of rows that skip a layer: their keys and values, and what replaces the layer's output.

To be traced, not run eagerly. It computes what `layer_body.py` and `compensation.py` do (tests hold them together).
Knows tensors; knows no sequences.
"""

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.linears.row_kernels import as_row_matrix, row_product
from dash_runtime.programs.packing import WeightPacking
from dash_runtime.programs.traced_layer import ModelShape, TracedLayer, rotate_first_heads, write_tokens


class _SkippedLayer(TracedLayer):
    """Rows that skip a layer, with keys and values in one action's precision.

    The compensation's inputs are a factor and an offset per channel, `[2 * hidden_size]`. A low-rank map has its int8
    matrices, from the hidden state and back, as `[2, rank, hidden_size]`, and `[rank + 2 * hidden_size]`: the scales of
    both matrices and an offset per channel.
    """

    def __init__(self, shape: ModelShape, action: Action, inputs: WeightPacking, rank: int) -> None:
        super().__init__(shape, action, inputs)
        self._rank = rank

    def _replaced(self, state: Tensor, compensation: tuple[Tensor, ...]) -> Tensor:
        """Returns what replaces the layer's output, float32."""
        size = self._shape.hidden_size
        if not self._rank:
            factors, offsets = compensation[0].split(size)
            return state * factors + offsets
        matrices, vectors = compensation
        # Loops over whole rows of the matrices, since tiles of so few numbers take three times as long.
        down_scales, up_scales, offsets = vectors.float().split((self._rank, size, size))
        narrow = (matrices[0].float() * state.unsqueeze(1)).sum(-1) * down_scales
        return state + offsets + (matrices[1].float() * narrow.unsqueeze(-1)).sum(1) * up_scales

    def _keys_values(
        self, state: Tensor, cosines: Tensor, sines: Tensor, weights: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        shape = self._shape
        vectors, matrices = self._inputs.split(weights)
        matrix = as_row_matrix(self._action, matrices[0]).outputs_from(shape.query_size)
        normed = self._normed(state, self._norms(vectors)[0])
        fused = row_product(self._action, normed, matrix.tensors())[:, -shape.key_value_size :]
        if shape.has_qkv_bias:
            fused = fused + vectors[-1][shape.query_size :]
        return rotate_first_heads(shape, fused, shape.num_kv_heads, cosines, sines, vectors)


class SkippedLayer(_SkippedLayer):
    """One row that skips a layer."""

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        cosines: Tensor,
        sines: Tensor,
        weights: tuple[Tensor, ...],
        compensation: tuple[Tensor, ...],
    ) -> Tensor:
        """Maps `[1, hidden_size]` to the same; writes the last of `keys` and `values`, like `FewRowsLayer`."""
        state = hidden.float()
        new_keys, new_values = self._keys_values(state, cosines, sines, weights)
        keys[-1:] = new_keys.to(keys.dtype)
        values[-1:] = new_values.to(values.dtype)
        return self._replaced(state, compensation).to(hidden.dtype)


class SkippedRows(_SkippedLayer):
    """Rows of different sequences that skip a layer."""

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        cosines: Tensor,
        sines: Tensor,
        weights: tuple[Tensor, ...],
        compensation: tuple[Tensor, ...],
    ) -> Tensor:
        """Maps `[rows, hidden_size]` to the same; writes the tokens `slots` `[rows]` of a whole pool's `keys` and
        `values`, `[blocks, BLOCK_TOKENS, num_kv_heads, head_dim]` each."""
        state = hidden.float()
        write_tokens(keys, values, slots, *self._keys_values(state, cosines, sines, weights))
        return self._replaced(state, compensation).to(hidden.dtype)
