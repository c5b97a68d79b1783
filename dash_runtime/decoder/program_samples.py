"""What a program is traced with: the module, inputs of the right shapes, and which of their dimensions vary.

Imported where programs are compiled. Knows shapes only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dash_runtime.actions import Action
from dash_runtime.decoder.kernels import pack_row_matrix
from dash_runtime.decoder.one_row import FewRowsLayer, Head, LateKeysValues, ModelShape, OneRowAttention
from dash_runtime.policy.one_row_policy import OneRowPolicy, PolicyShape

Sample = tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]
"""The module, its inputs, and the varying dimensions of each input."""

_DTYPE = torch.bfloat16
_SAMPLE_POSITIONS = 37
_MIN_POSITIONS = 2  # a compiler's constant 1 would stand for all lengths
_MAX_POSITIONS = 1 << 20


def layer_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    rows, varying = _rows(shape, num_rows)
    matrices = tuple(_matrix(action, size) for size in shape.matrices())
    inputs = (_zeros(num_rows, shape.hidden_size), *rows, _vectors(shape), matrices)
    return FewRowsLayer(shape, action, num_rows), inputs, (None, *varying, *_fixed(inputs[-2:]))


def attention_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    rows, varying = _rows(shape, 1)
    inputs = (_zeros(1, shape.query_size + shape.key_value_size), *rows, _vectors(shape))
    return OneRowAttention(shape, action), inputs, (None, *varying, *_fixed(inputs[-1:]))


def late_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    rows, varying = _rows(shape, None)
    matrix = _matrix(action, (shape.key_value_size, shape.hidden_size))
    inputs = (_zeros(_SAMPLE_POSITIONS, shape.hidden_size), *rows, _vectors(shape), matrix)
    return LateKeysValues(shape, action), inputs, (varying[0], *varying, *_fixed(inputs[-2:]))


def head_sample(shape: ModelShape, action: Action, num_rows: int) -> Sample:
    matrix = _matrix(action, (shape.vocab_size, shape.hidden_size))
    inputs = (_zeros(1, shape.hidden_size), _zeros(shape.hidden_size), matrix)
    return Head(shape, action), inputs, _fixed(inputs)


def policy_sample(shape: PolicyShape) -> Sample:
    num_outputs = shape.block_size * shape.num_actions
    sizes = (
        (1, shape.num_facts),
        (shape.width, shape.hidden_size),
        (shape.width,),
        (shape.num_facts, shape.width),
        (num_outputs, shape.width),
        (num_outputs,),
    )
    inputs = (_zeros(1, shape.hidden_size), *(torch.zeros(size) for size in sizes))
    return OneRowPolicy(shape), inputs, _fixed(inputs)


def _rows(shape: ModelShape, num_rows: int | None) -> tuple[list[Tensor], list[Any]]:
    """Keys, values, cosines and sines, of which the number of positions varies, and that of rows with it if it is
    None."""
    kept = [_zeros(_SAMPLE_POSITIONS, shape.num_kv_heads, shape.head_dim) for _ in range(2)]
    tables = [_zeros(num_rows or _SAMPLE_POSITIONS, 1, shape.head_dim) for _ in range(2)]
    fewest = _MIN_POSITIONS if num_rows is None else num_rows + 1
    positions = {0: torch.export.Dim("positions", min=fewest, max=_MAX_POSITIONS)}
    by_row = positions if num_rows is None else None
    return [*kept, *tables], [positions, positions, by_row, by_row]


def _vectors(shape: ModelShape) -> tuple[Tensor, ...]:
    vectors = [_zeros(shape.hidden_size), _zeros(shape.hidden_size)]
    if shape.has_qk_norm:
        vectors.append(_zeros(shape.num_heads + shape.num_kv_heads, shape.head_dim))
    if shape.has_qkv_bias:
        vectors.append(_zeros(shape.query_size + shape.key_value_size))
    return tuple(vectors)


def _matrix(action: Action, size: tuple[int, int]) -> tuple[Tensor, ...]:
    return pack_row_matrix(action, _zeros(*size)).tensors()


def _zeros(*size: int) -> Tensor:
    return torch.zeros(size, dtype=_DTYPE)


def _fixed(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """For each of these, that nothing varies."""
    nothing: tuple[Any, ...] = tree_map(lambda _: None, inputs)
    return nothing
