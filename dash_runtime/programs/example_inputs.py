"""Samples that programs are traced with: the module, inputs of the right shapes, and their varying dimensions.

Imported only to compile programs. Knows shapes only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dash_runtime.actions import Action
from dash_runtime.linears.dense_linear import FullLinear, make_full_linear
from dash_runtime.linears.row_kernels import RowMatrix, pack_row_matrix
from dash_runtime.programs.kv_blocks import BLOCK_TOKENS, attended_blocks
from dash_runtime.programs.packing import WeightPacking
from dash_runtime.programs.traced_deciding import DecidingLayer, packed_matrix, packed_terms
from dash_runtime.programs.traced_layer import FewRowsLayer, Head, ModelShape, RowsAttention, RowsNorm
from dash_runtime.programs.traced_policy import FewRowsPolicy, PolicyShape
from dash_runtime.programs.traced_skip import SkippedLayer, SkippedRows

Sample = tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]
"""The module, its inputs, and the varying dimensions of each input."""

_DTYPE = torch.bfloat16
_SAMPLE_BLOCKS = 37
_SAMPLE_POSITIONS = 509
"""Positions of one sequence. They are enough for Inductor to split every loop over them among all threads, which suits
a long context."""
_SAMPLE_ROWS = 16
_MIN_POSITIONS = 2  # the compiler would take a length of 1 for a constant
_MAX_POSITIONS = 1 << 20


def layer_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    layer_inputs, weights = _weights(shape, action)
    seen = [_zeros(_SAMPLE_POSITIONS, shape.num_kv_heads, shape.head_dim) for _ in range(2)]
    inputs = (_zeros(num_rows, shape.hidden_size), *seen, *_tables(shape, num_rows), weights)
    positions = {0: _varying("positions", num_rows + 1)}
    varying = (None, positions, positions, None, None)
    return FewRowsLayer(shape, action, layer_inputs), inputs, (*varying, *_fixed(inputs[-1:]))


def attention_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    positions = [BLOCK_TOKENS * _SAMPLE_BLOCKS - 1] * _SAMPLE_ROWS
    fused = _zeros(_SAMPLE_ROWS, shape.query_size + shape.key_value_size)
    attended = attended_blocks([0] * _SAMPLE_ROWS, positions, None)
    inputs = (fused, *_pool(shape), tuple(attended), *_tables(shape, _SAMPLE_ROWS), _vectors(shape))
    pool, rows, blocks = ({0: _varying(name)} for name in ("pool", "rows", "blocks"))
    by_block = (blocks, blocks, blocks, rows | {1: _varying("most")})
    return RowsAttention(shape, action), inputs, (rows, pool, pool, (rows, *by_block), rows, rows, *_fixed(inputs[-1:]))


def norm_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    inputs = (_zeros(_SAMPLE_ROWS, shape.hidden_size), _zeros(shape.hidden_size))
    return RowsNorm(shape, action), inputs, ({0: _varying("rows")}, None)


def skip_sample(shape: ModelShape, action: Action, rank: int) -> Sample:
    layer_inputs, weights = _weights(shape, action)
    seen = [_zeros(_SAMPLE_POSITIONS, shape.num_kv_heads, shape.head_dim) for _ in range(2)]
    inputs = (_zeros(1, shape.hidden_size), *seen, *_tables(shape, 1), weights, _compensation(shape, rank))
    positions = {0: _varying("positions")}
    varying = (None, positions, positions, None, None)
    return SkippedLayer(shape, action, layer_inputs, rank), inputs, (*varying, *_fixed(inputs[-2:]))


def skip_rows_sample(shape: ModelShape, action: Action, rank: int) -> Sample:
    layer_inputs, weights = _weights(shape, action)
    hidden, slots = _zeros(_SAMPLE_ROWS, shape.hidden_size), torch.arange(_SAMPLE_ROWS)
    inputs = (hidden, *_pool(shape), slots, *_tables(shape, _SAMPLE_ROWS), weights, _compensation(shape, rank))
    pool, rows = ({0: _varying(name)} for name in ("pool", "rows"))
    varying = (rows, pool, pool, rows, rows, rows)
    return SkippedRows(shape, action, layer_inputs, rank), inputs, (*varying, *_fixed(inputs[-2:]))


def deciding_sample(layer: Sample, policy: PolicyShape) -> Sample:
    """Returns the sample of a layer that also evaluates a policy."""
    module, inputs, varying = layer
    matrices = [(policy.width, policy.hidden_size), (policy.inner_width, policy.width)]
    own = [(policy.width,), (policy.num_facts, policy.width), (policy.inner_width,)]
    own += [(policy.num_actions, policy.inner_width), (policy.num_actions,)]
    exchanged = torch.zeros(policy.num_facts + 2 * policy.num_actions + 1)
    shared = [packed_matrix(torch.zeros(size)) for size in matrices]
    evaluation = (exchanged, *shared, packed_terms(*map(torch.zeros, own)))
    return DecidingLayer(module, policy), (inputs, evaluation), (varying, _fixed(evaluation))


def head_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    matrix = _matrix(action, (shape.vocab_size, shape.hidden_size)).tensors()
    inputs = (_zeros(1, shape.hidden_size), _zeros(shape.hidden_size), matrix)
    return Head(shape, action), inputs, _fixed(inputs)


def policy_sample(shape: PolicyShape) -> Sample:
    num_outputs = shape.block_size * shape.num_actions
    sizes: list[tuple[int, ...]] = [(shape.width, shape.hidden_size), (shape.width,), (shape.num_facts, shape.width)]
    sizes += [(shape.inner_width, shape.width), (shape.inner_width,), (num_outputs, shape.inner_width), (num_outputs,)]
    facts = torch.zeros(_SAMPLE_ROWS, shape.num_facts + shape.num_actions)
    inputs = (_zeros(_SAMPLE_ROWS, shape.hidden_size), facts, *(torch.zeros(size) for size in sizes))
    rows = {0: _varying("rows")}
    return FewRowsPolicy(shape), inputs, (rows, rows, *_fixed(inputs[2:]))


def _pool(shape: ModelShape) -> list[Tensor]:
    """Returns a pool's keys and values."""
    return [_zeros(_SAMPLE_BLOCKS, BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim) for _ in range(2)]


def _tables(shape: ModelShape, num_rows: int) -> list[Tensor]:
    """Returns cosines and sines."""
    return [_zeros(num_rows, 1, shape.head_dim) for _ in range(2)]


def _varying(name: str, fewest: int = _MIN_POSITIONS) -> Any:
    return torch.export.Dim(name, min=fewest, max=_MAX_POSITIONS)


def _vectors(shape: ModelShape) -> tuple[Tensor, ...]:
    return tuple(_zeros(*size) for size in shape.vector_sizes())


def _weights(shape: ModelShape, action: Action) -> tuple[WeightPacking, tuple[Tensor, ...]]:
    """Returns the joined weights of one layer, and their packing."""
    vectors, matrices = _vectors(shape), [_matrix(action, size) for size in shape.matrices()]
    layer_inputs = WeightPacking.of(vectors, matrices)
    return layer_inputs, tuple(layer_inputs.join(vectors, matrices))


def _compensation(shape: ModelShape, rank: int) -> tuple[Tensor, ...]:
    """Returns the inputs of one layer's compensation (`traced_skip.py`)."""
    if not rank:
        return (_zeros(2 * shape.hidden_size),)
    return torch.zeros(2, rank, shape.hidden_size, dtype=torch.int8), _zeros(rank + 2 * shape.hidden_size)


def _matrix(action: Action, size: tuple[int, int]) -> RowMatrix:
    weight = _zeros(*size)
    linear = make_full_linear(FullLinear(weight)) if action is Action.FULL else None
    return pack_row_matrix(action, weight, linear)


def _zeros(*size: int) -> Tensor:
    return torch.zeros(size, dtype=_DTYPE)


def _fixed(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the varying dimensions of inputs that do not vary."""
    nothing: tuple[Any, ...] = tree_map(lambda _: None, inputs)
    return nothing
