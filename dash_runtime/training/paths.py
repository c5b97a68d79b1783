"""Paths of whole batches through the dense model: what a policy does with each token, and what is left of it.

They decide as `rollout.py` and serving do (a test holds them together). Knows the dense model and choices; knows no
learning.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.rollout import Choose, costs_by_action
from dash_runtime.training.dense_decoder import Compensate, DenseDecoder


@dataclass(frozen=True, slots=True)
class Observation:
    """The view of one decision, a row per decided token: `hidden` `[rows, hidden_size]`, the rest `[rows]`."""

    hidden: Tensor
    last_actions: Tensor
    cost_spent: Tensor


@dataclass(frozen=True, slots=True)
class Path:
    """One path of whole sequences, whose first tokens are prompts and run in full.

    `states` are each layer's input and the last layer's output, `[batch, length, hidden_size]`; `actions` are Action's
    numbers, `[num_layers, batch, length]`; `observations` has one entry per decision block.
    """

    num_prompt_tokens: int
    states: list[Tensor]
    actions: Tensor
    observations: list[Observation]

    def decided(self, tensor: Tensor) -> Tensor:
        """Returns the rows of the decided tokens, `[rows, …]`, of `[batch, length, …]`."""
        return decided_rows(tensor, self.num_prompt_tokens)

    @property
    def decided_actions(self) -> Tensor:
        """The actions of the decided tokens, `[num_layers, rows]`."""
        return self.actions[:, :, self.num_prompt_tokens :].flatten(1)


def decided_rows(tensor: Tensor, num_prompt_tokens: int) -> Tensor:
    """Returns the rows after the prompts, `[rows, …]`, of `[batch, length, …]`."""
    return tensor[:, num_prompt_tokens:].flatten(0, 1)


def run_path(
    decoder: DenseDecoder,
    token_ids: Tensor,
    num_prompt_tokens: int,
    spec: PlanSpec,
    compensate: Compensate,
    choose: Choose,
) -> Path:
    """Runs int64 `[batch, length]`, the tokens after the prompts with the actions that `choose` takes.

    With gradients enabled they reach all states, the first included, and the compensation.
    """
    batch, length = token_ids.shape
    num_decided = batch * (length - num_prompt_tokens)
    layer_costs = costs_by_action(spec.costs)
    observed = {block[0] - spec.lookahead: block for block in spec.decision_blocks}
    chosen: dict[int, Tensor] = {}
    states, all_actions, observations = [decoder.embed(token_ids)], [], []
    if torch.is_grad_enabled():
        states[0].requires_grad_()
    spent = torch.zeros(num_decided)
    for layer in range(decoder.num_layers):
        own = chosen[layer] if layer in chosen else torch.full((num_decided,), int(spec.pinned[layer]))
        spent = spent + layer_costs[own]
        if (block := observed.get(layer)) is not None:
            observation = Observation(decided_rows(states[-1].detach(), num_prompt_tokens), own, spent)
            with torch.no_grad():
                decided = choose(block, observation.hidden, own, spent)
            chosen.update(zip(block, decided, strict=True))
            observations.append(observation)
        actions = torch.full((batch, length), int(Action.FULL))
        actions[:, num_prompt_tokens:] = own.view(batch, -1)
        all_actions.append(actions)
        states.append(decoder.run_layer(layer, actions, states[-1], compensate, spec.kv_action))
    return Path(num_prompt_tokens, states, torch.stack(all_actions), observations)
