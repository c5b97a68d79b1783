"""Layers run eagerly, on the library's kernels: any rows, any actions, any device. Knows layers and batches."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.heads import Heads
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.layers.layer_body import after_attention, before_attention, split_heads
from dash_runtime.layers.projection import Projection
from dash_runtime.layers.row_groups import Groups, group_rows, scatter_rows
from dash_runtime.model_config import ModelConfig

Tensors = tuple[Tensor, ...]
Part = Callable[..., Tensors]


class EagerBackend:
    """Groups rows by action and runs each group with that action's kernels.

    Args:
        layers: packed for few rows or for many, whichever this backend's passes have.
    """

    def __init__(self, config: ModelConfig, layers: Sequence[DecoderLayer], heads: Heads) -> None:
        self._config = config
        self._layers = layers
        self.logits = heads

    def takes(self, batch: Batch) -> bool:
        return True

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        groups = group_rows(actions)
        projection = batch.projection(layer, actions, hidden)
        queries = hidden
        if projection is not None:
            queries, keys, values = self._project(layer, projection)
            projection.write(layer, keys, values)
        parts: list[tuple[list[int] | None, Tensor]] = []
        for action, rows in groups:
            inputs = hidden if rows is None else hidden[rows]
            if action is Action.SKIP:
                outputs = batch.compensate(layer, inputs, rows)
            else:
                attended = batch.attend(layer, queries, rows)
                (outputs,) = self._run_part(self._after_attention, layer, action, inputs, attended)
            parts.append((rows, outputs))
        return scatter_rows(parts, batch.num_rows)

    def _run_part(self, part: Part, layer: int, action: Action, *inputs: Tensor) -> Tensors:
        """Runs a part of a layer for rows that all take one action."""
        return part(self._layers[layer], action, *inputs)

    def _project(self, layer: int, projection: Projection) -> Tensors:
        """Returns rotated queries, rotated keys, and values.

        Queries are `[rows of the pass, num_heads, head_dim]`, keys and values `[projected rows, num_kv_heads,
        head_dim]` each. A skipped row's query is arbitrary, or missing if all rows skip.
        """
        groups = group_rows(projection.actions)
        inputs = (projection.hidden, projection.cosines, projection.sines)
        if len(groups) == 1:
            queries, keys, values = self._run_part(self._before_attention, layer, groups[0][0], *inputs)
        else:
            queries, keys, values = self._before_attention_mixed(self._layers[layer], groups, *inputs)
        return queries if projection.own_rows is None else queries[projection.own_rows], keys, values

    def _before_attention(
        self, weights: DecoderLayer, action: Action, hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        normed = before_attention(weights, hidden)
        if action is Action.SKIP:
            return split_heads(self._config, weights, weights.key_value(normed), 0, cosines, sines)
        fused = weights.linears[action].query_key_value(normed)
        return split_heads(self._config, weights, fused, self._config.num_heads, cosines, sines)

    def _before_attention_mixed(
        self, weights: DecoderLayer, groups: Groups, hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        normed, config = before_attention(weights, hidden), self._config
        query_size = config.num_heads * config.head_dim
        fused = normed.new_zeros((len(normed), query_size + 2 * config.num_kv_heads * config.head_dim))
        for action, rows in groups:
            if action is Action.SKIP:
                fused[rows, query_size:] = weights.key_value(normed[rows])
            else:
                fused[rows] = weights.linears[action].query_key_value(normed[rows])
        return split_heads(config, weights, fused, config.num_heads, cosines, sines)

    def _after_attention(self, weights: DecoderLayer, action: Action, inputs: Tensor, attended: Tensor) -> Tensors:
        return (after_attention(self._config.block, weights, weights.linears[action], inputs, attended),)
