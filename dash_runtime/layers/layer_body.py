"""A layer's arithmetic, stated once over its family's `BlockConfig`.

Eager layers and passes with a gradient both run it. `native/layer.h` states it once more in C++; a test
holds the two together. Knows tensors; knows no caches, no actions and no kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.layers.mlp import GatedMlp, LinearT, Mixture, OtherT
from dash_runtime.layers.rotary import rotate
from dash_runtime.linears.dense_linear import Linear
from dash_runtime.model_config import BlockConfig, ModelConfig, QkNorm

OneT = TypeVar("OneT", bound=Linear)
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norms of one layer; None if its block has no such norm.

    Output norms are applied before the output is added to the residual. `head_norm` has the weights of `QkNorm.HEAD`,
    `[num_heads + num_kv_heads, head_dim]`; `query_norm` and `key_norm` are `QkNorm.WIDTH`'s, over all heads together.
    """

    input_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    head_norm: Tensor | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Linears(Generic[LinearT]):
    """The matrices of one layer in one precision. Query, key and value are one matrix."""

    query_key_value: LinearT
    output: LinearT
    mlp: GatedMlp[LinearT] | Mixture[LinearT]

    def mapped(
        self, convert: Callable[[LinearT], OtherT], convert_router: Callable[[LinearT], OtherT]
    ) -> "Linears[OtherT]":
        """Returns the layer with other matrices, such as those of another precision."""
        mlp = self.mlp.mapped(convert, convert_router)
        return Linears(convert(self.query_key_value), convert(self.output), mlp)

    def mapped_by_place(
        self, convert: Callable[[int, LinearT], OtherT], convert_router: Callable[[LinearT], OtherT]
    ) -> "Linears[OtherT]":
        """Does `mapped` by a function that gets each matrix's number too, which is always the same."""
        return self.mapped(_numbered(convert), convert_router)

    def matrices(self) -> tuple[LinearT, LinearT, LinearT, LinearT]:
        """Returns query-key-value, output, gate-up and down. Only for a layer without a mixture."""
        assert isinstance(self.mlp, GatedMlp)
        return self.query_key_value, self.output, self.mlp.gate_up, self.mlp.down


def _numbered(convert: Callable[[int, OneT], OtherT]) -> Callable[[OneT], OtherT]:
    numbers = count()
    return lambda own: convert(next(numbers), own)


def run_layer_body(
    block: BlockConfig, norms: Norms, linears: Linears[Linear], hidden: Tensor, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    """Runs one layer, `[..., hidden_size]` to the same.

    Args:
        attend: maps the input of the query-key-value product, `[..., hidden_size]`, to the heads' outputs,
            `[..., num_heads * head_dim]`.
    """
    return after_attention(block, norms, linears, hidden, attend(before_attention(norms, hidden)))


def before_attention(norms: Norms, hidden: Tensor) -> Tensor:
    """Returns the input of the query-key-value product, `[..., hidden_size]`."""
    return _normed(norms.input_norm, hidden)


def after_attention(
    block: BlockConfig, norms: Norms, linears: Linears[Linear], hidden: Tensor, attended: Tensor
) -> Tensor:
    """Returns the layer's output from its input and its heads' outputs, `[..., num_heads * head_dim]`."""
    residual = _added(block, hidden, _normed(norms.attention_output_norm, linears.output(attended)))
    inner = linears.mlp(_normed(norms.mlp_norm, residual), block.activation)
    return _added(block, residual, _normed(norms.mlp_output_norm, inner))


def split_heads(
    config: ModelConfig, norms: Norms, fused: Tensor, num_queries: int, cosines: Tensor, sines: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a query-key-value product into heads.

    Args:
        fused: `[..., (num_queries + 2 * num_kv_heads) * head_dim]`, bias included.
        num_queries: the number of query heads; 0 for a product of keys and values alone.
        cosines: `[..., 1, head_dim]`, like `sines`.

    Returns:
        Queries and keys, normed and rotated, and values: `[..., heads, head_dim]` each.
    """
    head_dim, num_rotated = config.head_dim, num_queries + config.num_kv_heads
    if config.block.qk_norm is QkNorm.WIDTH:
        fused = _normed_over_width(norms, fused, num_queries * head_dim, num_rotated * head_dim)
    heads = fused.unflatten(-1, (-1, head_dim))
    rotated = heads[..., :num_rotated, :]
    if norms.head_norm is not None:
        rotated = functional.rms_norm(rotated, (head_dim,), None, config.rms_norm_eps) * norms.head_norm[-num_rotated:]
    rotated = rotate(rotated, cosines, sines)
    return rotated[..., :num_queries, :], rotated[..., num_queries:, :], heads[..., num_rotated:, :]


def _normed_over_width(norms: Norms, fused: Tensor, query_size: int, rotated_size: int) -> Tensor:
    queries, keys, values = fused.tensor_split((query_size, rotated_size), dim=-1)
    normed_queries = _normed(norms.query_norm, queries) if query_size else queries
    return torch.cat((normed_queries, _normed(norms.key_norm, keys), values), dim=-1)


def _normed(norm: Norm | None, inputs: Tensor) -> Tensor:
    return inputs if norm is None else norm(inputs)


def _added(block: BlockConfig, residual: Tensor, branch: Tensor) -> Tensor:
    return residual + (branch if block.residual_multiplier == 1 else branch * block.residual_multiplier)
