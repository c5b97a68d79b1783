"""Layers run eagerly, on the library's kernels: any rows, any actions, any device. Knows layers and batches."""

from collections.abc import Sequence

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.loop import LayerLoop, LoopEnds
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.heads import Heads
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.layers.layer_body import after_attention, before_attention, split_heads
from dash_runtime.layers.row_groups import Groups, group_rows, index_of, scatter_rows, take_rows
from dash_runtime.model_config import ModelConfig

Tensors = tuple[Tensor, ...]
Kernel = tuple[Action, bool]
"""The action whose matrix projects a row, and whether for keys and values alone, since the row skips the layer."""


class EagerBackend(LayerLoop):
    """Groups rows by action and runs each group with that action's kernels.

    Args:
        layers: packed for few rows or for many, whichever this backend's passes have.
    """

    def __init__(self, ends: LoopEnds, config: ModelConfig, layers: Sequence[DecoderLayer], heads: Heads) -> None:
        super().__init__(ends)
        self._config = config
        self._layers = layers
        self.logits = heads

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        queries, keys, values = self._project(layer, actions, hidden, batch)
        batch.write(layer, keys, values)
        runs = [action is not Action.SKIP for action in actions]
        attended = batch.attend(layer, queries, runs) if any(runs) else queries
        parts: list[tuple[list[int] | None, Tensor]] = []
        for action, rows in group_rows(actions):
            inputs = take_rows(hidden, rows)
            if action is Action.SKIP:
                outputs = batch.compensate(layer, inputs, rows)
            else:
                weights, heads = self._layers[layer], take_rows(attended, rows)
                outputs = after_attention(self._config.block, weights, weights.linears[action], inputs, heads)
            parts.append((rows, outputs))
        return scatter_rows(parts, batch.num_rows)

    def _project(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensors:
        """Returns rotated queries `[rows, num_heads, head_dim]`, rotated keys and values `[rows, num_kv_heads,
        head_dim]`. A skipped row's query is arbitrary, or missing if all rows skip."""
        inputs = (hidden, *batch.tables(layer))
        groups = group_rows([_kernel(*own) for own in zip(actions, batch.kv_actions, strict=True)])
        if len(groups) > 1:
            return self._project_mixed(self._layers[layer], groups, *inputs)
        ((action, is_skipped), _), *_ = groups
        part = self._keys_values if is_skipped else self._before_attention
        return part(self._layers[layer], action, *inputs)

    def _before_attention(
        self, weights: DecoderLayer, action: Action, hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        fused = weights.linears[action].query_key_value(before_attention(weights, hidden))
        return split_heads(self._config, weights, fused, self._config.num_heads, cosines, sines)

    def _keys_values(
        self, weights: DecoderLayer, action: Action, hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        fused = weights.key_values[action](before_attention(weights, hidden))
        return split_heads(self._config, weights, fused, 0, cosines, sines)

    def _project_mixed(
        self, weights: DecoderLayer, groups: Groups[Kernel], hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        normed, config = before_attention(weights, hidden), self._config
        query_size = config.query_size
        fused = normed.new_zeros((len(normed), query_size + 2 * config.num_kv_heads * config.head_dim))
        for (action, is_skipped), rows in groups:
            assert rows is not None
            index = index_of(rows, normed)
            if is_skipped:
                fused[index, query_size:] = weights.key_values[action](normed[index])
            else:
                fused[index] = weights.linears[action].query_key_value(normed[index])
        return split_heads(config, weights, fused, config.num_heads, cosines, sines)


def _kernel(action: Action, kv_action: Action) -> Kernel:
    return (kv_action, True) if action is Action.SKIP else (action, False)
