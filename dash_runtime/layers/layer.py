"""The weights of one decoder layer, in every precision that is offered. Knows matrices; knows no rows and no caches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import FullLinear, Linear, for_many_rows
from dash_runtime.linears.quantization import make_linear


@dataclass(frozen=True, slots=True)
class LayerLinears:
    """The four matrices of a layer in one precision. Query, key and value are fused, and so are gate and up."""

    query_key_value: Linear
    output: Linear
    gate_up: Linear
    down: Linear

    def matrices(self) -> tuple[Linear, ...]:
        """Returns all four, in this order."""
        return self.query_key_value, self.output, self.gate_up, self.down

    def for_many_rows(self) -> "LayerLinears":
        """Returns the same matrices for passes over many rows."""
        return LayerLinears(*map(for_many_rows, self.matrices()))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer. For its norms see `layer_body.Norms`. A skipped layer still runs `key_value` (the KV rule)."""

    input_norm: RmsNorm | None
    attention_output_norm: RmsNorm | None
    mlp_norm: RmsNorm | None
    mlp_output_norm: RmsNorm | None
    head_norm: Tensor | None
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    key_value: Linear
    linears: Mapping[Action, LayerLinears]

    def for_many_rows(self) -> "DecoderLayer":
        """Returns the same layer for passes over many rows (dense_linear.py)."""
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
    return DecoderLayer(
        input_norm=weights.input_norm,
        attention_output_norm=weights.attention_output_norm,
        mlp_norm=weights.mlp_norm,
        mlp_output_norm=weights.mlp_output_norm,
        head_norm=weights.head_norm,
        query_norm=weights.query_norm,
        key_norm=weights.key_norm,
        key_value=make_linear(Action.FULL, key_value),
        linears=linears,
    )
