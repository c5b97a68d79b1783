"""The weights of one decoder layer, in every precision that is offered. Knows matrices; knows no rows and no caches."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

from dash_runtime.actions import Action
from dash_runtime.layers.layer_body import Linears, Norms
from dash_runtime.layers.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import Linear
from dash_runtime.linears.kept_trials import NO_TRIALS, KeptTrials
from dash_runtime.linears.quantization import for_many_rows, make_linear


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer(Norms):
    """One layer. A skipped layer still runs one of `key_values` (the KV rule)."""

    key_values: Mapping[Action, Linear]
    linears: Mapping[Action, Linears[Linear]]

    def for_many_rows(self) -> "DecoderLayer":
        """Returns the same layer for passes over many rows."""
        linears = {action: own.mapped(for_many_rows, for_many_rows) for action, own in self.linears.items()}
        key_values = {action: for_many_rows(own) for action, own in self.key_values.items()}
        return replace(self, key_values=key_values, linears=linears)


def make_layer(
    weights: LayerWeights, query_size: int, actions: tuple[Action, ...], trials: KeptTrials = NO_TRIALS
) -> DecoderLayer:
    """Packs a layer for the given actions."""
    key_value = weights.linears.query_key_value.outputs(query_size)
    running: list[Action] = [action for action in actions if action is not Action.SKIP]
    makers = {action: partial(make_linear, action, trials=trials) for action in (*running, Action.FULL)}
    # A row's experts are chosen in FULL whatever they run in.
    linears = {action: weights.linears.mapped(makers[action], makers[Action.FULL]) for action in running}
    norms = {field.name: getattr(weights, field.name) for field in fields(Norms)}
    key_values = {action: makers[action](key_value) for action in running}
    return DecoderLayer(**norms, key_values=key_values, linears=linears)
