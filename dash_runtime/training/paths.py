"""Paths of whole batches through the dense model: what a policy does with each token, and what is left of it.

They decide as `rollout.py` and serving do (a test holds them together). Knows the dense model and choices; knows no
learning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.rollout import Choose, costs_by_action
from dash_runtime.training.dense_decoder import Compensate, DenseDecoder, KeysValues, Text


@dataclass(frozen=True, slots=True)
class Observation:
    """The view of one decision, a row per decided token: `hidden` `[rows, hidden_size]`, the rest `[rows]`."""

    hidden: Tensor
    last_actions: Tensor
    cost_spent: Tensor


@dataclass(frozen=True, slots=True)
class Path:
    """One path of every decided token.

    `states` are each layer's input and the last layer's output, `[batch, decided, hidden_size]`; `actions` are Action's
    numbers, `[num_layers, batch, decided]`; `observations` has one entry per decision block.
    """

    states: list[Tensor]
    keys_values: list[KeysValues]
    actions: Tensor
    observations: list[Observation]


def skip_kernel(actions: Sequence[Action]) -> Action:
    """Returns the kernel that projects the keys and values of rows that skip: the cheapest that the policy may run."""
    return min(action for action in actions if action is not Action.SKIP)


@torch.no_grad()
def run_path(decoder: DenseDecoder, text: Text, spec: PlanSpec, compensate: Compensate, choose: Choose) -> Path:
    """Runs the decided tokens with the actions that `choose` takes."""
    shape = text.token_ids.shape
    layer_costs = costs_by_action(spec.costs)
    observed = {block[0] - spec.lookahead: block for block in spec.decision_blocks}
    decided: dict[int, Tensor] = {}
    states, keys_values, all_actions, observations = [decoder.embed(text.token_ids)], [], [], []
    spent = torch.zeros(shape.numel())
    for layer in range(decoder.num_layers):
        actions = decided[layer] if layer in decided else torch.full((shape.numel(),), int(spec.pinned[layer]))
        spent = spent + layer_costs[actions]
        if (block := observed.get(layer)) is not None:
            observation = Observation(states[-1].flatten(0, 1), actions, spent)
            chosen = choose(block, observation.hidden, actions, spent)
            decided.update(zip(block, chosen, strict=True))
            observations.append(observation)
        all_actions.append(actions.view(shape))
        hidden, keys, values = _run(decoder, layer, all_actions[-1], states[-1], text, compensate, spec, None)
        states.append(hidden)
        keys_values.append((keys, values))
    return Path(states, keys_values, torch.stack(all_actions), observations)


@torch.no_grad()
def change_layer(
    decoder: DenseDecoder,
    text: Text,
    spec: PlanSpec,
    compensate: Compensate,
    path: Path,
    layer: int,
    actions: Tensor,
    is_context_frozen: bool,
) -> Tensor:
    """Returns the last layer's output if other actions run at one layer, `[batch, decided]`. Later layers keep theirs.

    With a frozen context each token sees the others' keys and values as the path left them, so that the result tells
    the token's own damage. Otherwise they follow, and the damage to later tokens is in it.
    """
    hidden = path.states[layer]
    for later in range(layer, decoder.num_layers):
        own = actions if later == layer else path.actions[later]
        frozen = path.keys_values[later] if is_context_frozen else None
        hidden, _, _ = _run(decoder, later, own, hidden, text, compensate, spec, frozen)
    return hidden


def _run(
    decoder: DenseDecoder,
    layer: int,
    actions: Tensor,
    hidden: Tensor,
    text: Text,
    compensate: Compensate,
    spec: PlanSpec,
    frozen: KeysValues | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return decoder.run_layer(layer, actions, hidden, text, compensate, skip_kernel(spec.actions), frozen)
