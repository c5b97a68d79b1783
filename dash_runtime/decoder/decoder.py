"""A decoder of the Llama family, one layer at a time.

Knows weights, actions and rows; knows no policy, no sampling and no requests. Nothing here writes into
a tensor that it returned before, so that a policy may still be reading a layer's input while the layer runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.cuda_graphs import Graphs, Tensors
from dash_runtime.decoder.backends.inductor import CompiledLayers
from dash_runtime.decoder.batch import Batch
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.decoder.embedding import make_embedding
from dash_runtime.decoder.kv_cache import CachePool, SequenceCache
from dash_runtime.decoder.layer import DecoderLayer, make_layer, mlp, scatter_rows
from dash_runtime.decoder.pending_kv import Projection, group_rows
from dash_runtime.decoder.rotary import RotaryTable, rotate
from dash_runtime.decoder.weight_loader import WeightLoader
from dash_runtime.linears.dense_linear import (
    MAX_INVARIANT_ROWS,
    BatchInvariantLinear,
    FullLinear,
    Linear,
    for_many_rows,
    most_rows_apart,
)
from dash_runtime.linears.quantization import make_linear
from dash_runtime.model_config import ModelConfig

Groups = Sequence[tuple[Action, list[int] | None]]
Part = Callable[..., Tensors]
Head = Callable[[Tensor], Tensor]
"""float32 `[rows, vocab_size]` from the last layer's output, its final norm included."""
_ROW_BLOCK_ON_CPU, _ROW_BLOCK_ELSEWHERE = 64, 256
"""Smaller ones let more of a prompt be reused, and cost more: on a CPU attention takes one at a time, which makes a
prefill a few per cent slower (`benchmarks/prefix.py`); elsewhere a pass does, and a short one takes as long as a long
one."""


class Decoder:
    """The model's layers with their kernels, embedding and head.

    Args:
        weights: tensors by their Hugging Face names, in the shapes that `config` asks for.
        actions: those to pack kernels for, FULL among them.
        context_length: positions to make rotary tables for.
        compiled: the layers' programs, which this fills; decoding then runs them, and quantised actions have no
            other kernels. None: everything runs eagerly.
        graphs: what eager decoding runs its layers with, where there are CUDA graphs.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        actions: tuple[Action, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        context_length: int,
        compiled: CompiledLayers | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.config = config
        self.num_layers = config.num_layers
        self.actions = actions
        self.dtype = dtype
        self.device = device
        self.context_length = context_length
        self._rotary = RotaryTable(config.ropes[0], config.head_dim, context_length, dtype, device)
        self._eps = config.rms_norm_eps
        self._query_size = config.num_heads * config.head_dim
        # The matrices are packed anew: a mapped file that stays for the sake of the rest would stay whole.
        loader = WeightLoader(config, weights, dtype, device, copies=compiled is not None)
        self._compiled = compiled
        self._graphs = graphs
        self.layers: list[DecoderLayer] = []
        for index in range(config.num_layers):
            layer_weights = loader.layer(index)
            eager_actions = actions if compiled is None else (Action.FULL,)
            layer = make_layer(layer_weights, self._query_size, eager_actions)
            if compiled is not None:
                compiled.add_layer(layer_weights, layer.linears[Action.FULL])
            self.layers.append(layer)
        self._wide_layers = [layer.for_many_rows() for layer in self.layers]
        self.row_block = _ROW_BLOCK_ON_CPU if device.type == "cpu" else _ROW_BLOCK_ELSEWHERE
        """Where a prompt may be cut: a row's numbers are the same whatever rows are in its pass, if every pass begins
        at a multiple of this and has `max_prompt_rows` at most."""
        is_invariant = isinstance(self._wide_layers[0].key_value, BatchInvariantLinear)
        self.max_prompt_rows = MAX_INVARIANT_ROWS if is_invariant else self.row_block
        self._final_norm = loader.norm("model.norm.weight")
        embedding = loader.tensor("model.embed_tokens.weight")
        head = embedding if config.has_tied_head else loader.tensor("lm_head.weight")
        # An INT4 head changes the text (docs/architecture.md), so it is not offered.
        precisions = [action for action in actions if action in (Action.INT8, Action.FULL)]
        full = make_linear(Action.FULL, FullLinear(head))
        self.embed = make_embedding(embedding, full if config.has_tied_head else None)
        """The input of layer 0, `[tokens, hidden_size]`, from token ids."""
        self.heads: dict[Action, Head] = {precision: self._make_head(precision, head, full) for precision in precisions}
        self._wide_head = self._eager_head(for_many_rows(full))

    def caches(self, sizes: Sequence[int]) -> list[SequenceCache]:
        """Caches for so many positions each, in a pool of their own."""
        pool = CachePool(self.config, sum(sizes), self.dtype, self.device, max_sequences=len(sizes))
        return [cache for size in sizes if (cache := pool.reserve(size)) is not None]

    def rows(
        self,
        caches: Sequence[SequenceCache],
        lengths: Sequence[int],
        compensations: Sequence[Compensation],
        as_decoding: bool = False,
        is_prompt: bool = False,
    ) -> Batch:
        """The rows of one pass: `lengths[i]` more positions of `caches[i]`; the rest as in `Batch`."""
        windows = self.config.sliding_window
        return Batch(caches, lengths, self._rotary, compensations, windows, self.row_block, as_decoding, is_prompt)

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        """Runs one layer with each row's own action and returns its output, `[rows, hidden_size]`.

        Every row's keys and values are written, a skipped one's from the layer's input and no later than a row attends
        to them (the KV rule).
        """
        if self._compiled is not None and batch.is_decoding:
            return self._compiled.run(layer, self._wide_layers[layer], actions, hidden, batch)
        if self._compiled is not None and batch.is_as_decoding:
            return self._compiled.run_as_decoding(layer, hidden, batch)
        groups = group_rows(actions)
        projection = batch.projection(layer, actions, hidden)
        queries = hidden
        if projection is not None:
            queries, keys, values = self._project(layer, projection, batch)
            batch.write(layer, projection, keys, values)
        parts: list[tuple[list[int] | None, Tensor]] = []
        for action, rows in groups:
            inputs = hidden if rows is None else hidden[rows]
            if action is Action.SKIP:
                outputs = batch.compensate(layer, inputs, rows)
            else:
                attended = batch.attend(layer, queries, rows)
                (outputs,) = self._run_part(self._after_attention, layer, action, batch, inputs, attended)
            parts.append((rows, outputs))
        return scatter_rows(parts, batch.num_rows)

    def logits(self, hidden: Tensor, precisions: Sequence[Action]) -> Tensor:
        """float32 `[rows, vocab_size]` from the last layer's output, with each row's head precision."""
        if len(precisions) > most_rows_apart() and self._compiled is not None and self._compiled.shares_products:
            return self._wide_head(hidden)  # one product for all is the fastest there
        parts = [
            (rows, self.heads[precision](hidden if rows is None else hidden[rows]))
            for precision, rows in group_rows(precisions)
        ]
        return scatter_rows(parts, len(precisions))

    def _make_head(self, precision: Action, weight: Tensor, full: Linear) -> Head:
        if self._compiled is not None and (head := self._compiled.head(precision, weight, self._final_norm)):
            return head
        return self._eager_head(full if precision is Action.FULL else make_linear(precision, FullLinear(weight)))

    def _eager_head(self, linear: Linear) -> Head:
        return lambda hidden: linear(self._final_norm(hidden)).float()

    def _weights(self, layer: int, batch: Batch) -> DecoderLayer:
        return (self.layers if batch.is_like_decoded else self._wide_layers)[layer]

    def _run_part(self, part: Part, layer: int, action: Action, batch: Batch, *inputs: Tensor) -> Tensors:
        """A part of a layer whose rows all take one action; in decoding as a graph, where there are graphs."""
        function = partial(part, self._weights(layer, batch), action)
        if self._graphs is None or not batch.is_decoding:
            return function(*inputs)
        return self._graphs.run((part.__name__, layer, action), function, inputs)

    def _project(self, layer: int, projection: Projection, batch: Batch) -> Tensors:
        """Rotated queries `[rows of the pass, num_heads, head_dim]`, rotated keys and values `[projected rows,
        num_kv_heads, head_dim]`. Skipped rows have no query: theirs is any, or missing where all skip."""
        groups = group_rows(projection.actions)
        inputs = (projection.hidden, projection.cosines, projection.sines)
        if len(groups) == 1:
            queries, keys, values = self._run_part(self._before_attention, layer, groups[0][0], batch, *inputs)
        else:
            queries, keys, values = self._before_attention_mixed(self._weights(layer, batch), groups, *inputs)
        return queries if projection.own_rows is None else queries[projection.own_rows], keys, values

    def _before_attention(
        self, weights: DecoderLayer, action: Action, hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        normed = weights.input_norm(hidden)
        if action is Action.SKIP:
            return self._heads(weights, weights.key_value(normed), 0, cosines, sines)
        fused = weights.linears[action].query_key_value(normed)
        return self._heads(weights, fused, self.config.num_heads, cosines, sines)

    def _before_attention_mixed(
        self, weights: DecoderLayer, groups: Groups, hidden: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        normed = weights.input_norm(hidden)
        key_value_size = 2 * self.config.num_kv_heads * self.config.head_dim
        fused = normed.new_zeros((len(normed), self._query_size + key_value_size))
        for action, rows in groups:
            if action is Action.SKIP:
                fused[rows, self._query_size :] = weights.key_value(normed[rows])
            else:
                fused[rows] = weights.linears[action].query_key_value(normed[rows])
        return self._heads(weights, fused, self.config.num_heads, cosines, sines)

    def _heads(
        self, weights: DecoderLayer, fused: Tensor, num_query_heads: int, cosines: Tensor, sines: Tensor
    ) -> Tensors:
        """A product's queries, keys and values, `[rows, heads, head_dim]` each, the first two normed and rotated."""
        config = self.config
        num_rotated = num_query_heads + config.num_kv_heads
        heads = fused.view(len(fused), -1, config.head_dim)
        rotated = heads[:, :num_rotated]
        if weights.head_norm is not None:
            head_norm = weights.head_norm[-num_rotated:]
            rotated = functional.rms_norm(rotated, (config.head_dim,), None, self._eps) * head_norm
        rotated = rotate(rotated, cosines, sines)
        return rotated[:, :num_query_heads], rotated[:, num_query_heads:], heads[:, num_rotated:]

    def _after_attention(self, weights: DecoderLayer, action: Action, inputs: Tensor, attended: Tensor) -> Tensors:
        linears = weights.linears[action]
        residual = inputs + linears.output(attended)
        return (residual + mlp(linears, weights.mlp_norm(residual)),)
