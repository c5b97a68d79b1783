"""What a token costs before anything was measured: a lone row takes as long as its weights take to be read.

Knows shapes; knows no device.
"""

import time
from collections.abc import Collection

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.cost_fit import CostSpread, MeasuredCosts
from dash_runtime.linears.quantization import bytes_per_weight, layer_bytes_per_weight
from dash_runtime.model_config import ModelConfig

_FIXED_SHARE = 0.01
EVALUATION_SHARE = 0.02
"""The share of a layer's time that an evaluation of a policy may take."""
_SPREAD = 0.5


def estimated_costs(
    model: ModelConfig, actions: Collection[Action], heads: Collection[Action], has_policy: bool
) -> MeasuredCosts:
    """Returns costs by the bytes that each action reads, as what is hardly known."""

    def bytes_of(action: Action) -> float:
        return bytes_per_weight(action, torch.bfloat16, is_native=True)

    num_layers, head_weights = model.num_layers, model.vocab_size * model.hidden_size
    weights = sum(map(model.num_weights_read, range(num_layers))) / num_layers
    layer: dict[Action, float] = {
        action: layer_bytes_per_weight(action, torch.bfloat16, is_native=True) * weights
        for action in actions
        if action is not Action.SKIP
    }
    if Action.SKIP in actions:
        layer[Action.SKIP] = min(layer.values()) * model.key_value_size * model.hidden_size / weights
    head = {own: head_weights * bytes_of(Action.INT4 if own is Action.SKIP else own) for own in heads}
    whole = num_layers * max(layer.values()) + max(head.values())
    evaluation = EVALUATION_SHARE * layer[max(layer)] if has_policy else 0.0
    ordered = {action: layer[action] for action in sorted(layer)}
    table = CostTable.from_seconds(num_layers, ordered, head, _FIXED_SHARE * whole, evaluation)
    return MeasuredCosts(table, CostSpread.around(table, _SPREAD), 0, time.time())
