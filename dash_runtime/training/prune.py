"""Pins the layers in which a policy nearly always decides alike: an evaluation costs its time whatever it decides.

Knows terms, networks and rates; knows no text.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec

_LEAST_RETURN = 2.0
"""A decision must change a token's cost by so many times its own evaluation: a skip saves its cost, but at the margin
its damage takes back as much, and a token that may not skip here skips elsewhere."""
_SHARED = ("hidden_weight", "inner_weight")
"""Tensors that all blocks share; the first dimension of the others is the block."""


def pin_settled_layers(spec: PlanSpec, network: PolicyNetwork, rates: Tensor) -> tuple[PlanSpec, PolicyNetwork]:
    """Returns terms and network without the decisions that do not pay for their evaluation by the spec's costs.

    Args:
        rates: how often each layer ran with each action, `[num_layers, 4]` (`choices.action_rates`). A layer stays free
            if its other actions change a token's cost, against the usual one, by more than twice what an evaluation
            costs, or if it is mostly skipped: at a lower price it would run. So do the layer where actions change most,
            and blocks of several layers.
    """
    if spec.block_size > 1:
        return spec, network
    usual = {layer: Action(int(rates[layer].argmax()) + 1) for layer in spec.free_layers}
    changed = {layer: _difference(spec, rates[layer].tolist(), usual[layer]) for layer in spec.free_layers}
    best = max(changed, key=lambda layer: changed[layer])
    kept = [
        number
        for number, (layer,) in enumerate(spec.decision_blocks)
        if layer == best or usual[layer] is Action.SKIP or changed[layer] > _LEAST_RETURN * spec.costs.evaluation
    ]
    pinned = {layer: usual[layer] for number, (layer,) in enumerate(spec.decision_blocks) if number not in kept}
    own = {field.name: getattr(network, field.name) for field in fields(network) if field.name not in _SHARED}
    index = torch.tensor(kept)
    network = replace(network, **{name: tensor[index].clone() for name, tensor in own.items()})
    return replace(spec, pinned=dict(sorted({**spec.pinned, **pinned}.items()))), network


def _difference(spec: PlanSpec, rates: list[float], usual: Action) -> float:
    """Returns the share of a token by which the unusual actions of a layer change its cost in the mean."""
    costs = spec.costs.layer
    return sum(rate * abs(costs[usual] - costs[action]) for action, rate in zip(Action, rates, strict=True) if rate)
