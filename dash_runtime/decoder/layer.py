"""The weights of one decoder layer, in every precision that is offered."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.decoder.norm import RmsNorm
from dash_runtime.decoder.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import FullLinear, Linear, for_many_rows
from dash_runtime.linears.quantization import make_linear


@dataclass(frozen=True, slots=True)
class LayerLinears:
    """The four matrices of a layer in one precision, with query, key and value fused, and gate and up."""

    query_key_value: Linear
    output: Linear
    gate_up: Linear
    down: Linear

    def matrices(self) -> tuple[Linear, ...]:
        """All four, in this order."""
        return self.query_key_value, self.output, self.gate_up, self.down

    def for_many_rows(self) -> "LayerLinears":
        """The same matrices for passes over many rows."""
        return LayerLinears(*map(for_many_rows, self.matrices()))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer.

    `key_value` is what a skipped layer still runs (the KV rule). `head_norm` is the query and key norm,
    `[num_heads + num_kv_heads, head_dim]`.
    """

    input_norm: RmsNorm
    mlp_norm: RmsNorm
    head_norm: Tensor | None
    key_value: Linear
    linears: Mapping[Action, LayerLinears]

    def for_many_rows(self) -> "DecoderLayer":
        """The same layer for passes over many rows (dense_linear.py)."""
        linears = {action: own.for_many_rows() for action, own in self.linears.items()}
        return replace(self, key_value=for_many_rows(self.key_value), linears=linears)


def make_layer(weights: LayerWeights, query_size: int, actions: tuple[Action, ...]) -> DecoderLayer:
    """Packs a layer for the given actions."""
    fused = weights.query_key_value
    full = (fused, weights.output, weights.gate_up, weights.down)
    key_value = FullLinear(fused.weight[query_size:], None if fused.bias is None else fused.bias[query_size:])
    linears: dict[Action, LayerLinears] = {
        action: LayerLinears(*(make_linear(action, linear) for linear in full))
        for action in actions
        if action is not Action.SKIP
    }
    packed_key_value = make_linear(Action.FULL, key_value)
    return DecoderLayer(weights.input_norm, weights.mlp_norm, weights.head_norm, packed_key_value, linears)


def mlp(linears: LayerLinears, inputs: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020), `[rows, hidden_size]` to the same."""
    gate, up = linears.gate_up(inputs).chunk(2, dim=-1)
    return linears.down(functional.silu(gate).mul_(up))


def scatter_rows(parts: list[tuple[list[int] | None, Tensor]], num_rows: int) -> Tensor:
    """Puts the groups' rows back in order: the inverse of taking them apart by action."""
    if len(parts) == 1:
        return parts[0][1]
    whole = parts[0][1].new_empty((num_rows, *parts[0][1].shape[1:]))
    for rows, part in parts:
        whole[torch.tensor(rows, device=part.device)] = part
    return whole
