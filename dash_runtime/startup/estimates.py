"""What a token costs before anything was measured: a lone row takes as long as its weights take to be read.

Knows shapes; knows no device.
"""

import time
from collections.abc import Collection

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.cost_fit import CostSpread, MeasuredCosts
from dash_runtime.model_config import ModelConfig

_BYTES: dict[Action, float] = {Action.INT3: 0.4375, Action.INT4: 0.5625, Action.INT8: 1.0, Action.FULL: 2.0}
_FIXED_SHARE = 0.01
_EVALUATION_SHARE = 0.1
"""What an evaluation of a policy takes, as a share of a layer."""
_SPREAD = 0.5


def estimated_costs(
    model: ModelConfig, actions: Collection[Action], heads: Collection[Action], has_policy: bool
) -> MeasuredCosts:
    """Returns costs by the bytes that each action reads, as what is hardly known."""
    num_layers, head_weights = model.num_layers, model.vocab_size * model.hidden_size
    weights = sum(map(model.num_weights_read, range(num_layers))) / num_layers
    layer: dict[Action, float] = {action: _BYTES[action] * weights for action in actions if action is not Action.SKIP}
    if Action.SKIP in actions:
        layer[Action.SKIP] = min(layer.values()) * model.key_value_size * model.hidden_size / weights
    head = {own: head_weights * _BYTES.get(own, _BYTES[Action.INT4]) for own in heads}
    whole = num_layers * max(layer.values()) + max(head.values())
    evaluation = _EVALUATION_SHARE * layer[max(layer)] if has_policy else 0.0
    ordered = {action: layer[action] for action in sorted(layer)}
    table = CostTable.from_seconds(num_layers, ordered, head, _FIXED_SHARE * whole, evaluation)
    return MeasuredCosts(table, CostSpread.around(table, _SPREAD), 0, time.time())
