"""Ways to choose actions in a rollout: a network's best ones, fixed plans, draws at given rates.

Knows networks and rates; knows no rewards and no tables of results.
"""

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.policy.network import PolicyNetwork, facts_of
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.rollout import Choose


def greedy_choice(spec: PlanSpec, network: PolicyNetwork, log_price: Tensor) -> Choose:
    """Chooses the network's best actions at `log_price`, a number or one per row."""
    numbers = torch.tensor([int(action) for action in spec.actions])
    costs = torch.tensor([spec.costs.layer[action] for action in spec.actions])
    places = {block: index for index, block in enumerate(spec.decision_blocks)}

    def choose(block: tuple[int, ...], hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        prices = log_price.expand(len(hidden))
        facts = facts_of(last_actions, spent, prices, network.num_known)
        priced = (prices.exp().unsqueeze(1) * costs).unsqueeze(1)
        scores = network.scores(places[block], hidden, facts, priced)
        scores = scores[:, : len(block)]
        return numbers[scores.argmax(dim=-1)].T

    return choose


def no_choice(block: tuple[int, ...], hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
    """The choice on terms that pin every layer: a fixed plan's."""
    raise AssertionError("there is no block to decide")


def random_choice(rates: Tensor, seed: int = 0) -> Choose:
    """Draws at rates of `[num_layers, 4]`, by Action's order."""
    generator = torch.Generator().manual_seed(seed)

    def choose(block: tuple[int, ...], hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        return 1 + torch.multinomial(rates[list(block)], len(hidden), replacement=True, generator=generator)

    return choose


def action_rates(actions: Tensor) -> Tensor:
    """Returns each layer's rate of each action, float32 `[num_layers, 4]`, from actions `[num_layers, rows]`."""
    return torch.stack([(actions == int(action)).float().mean(dim=1) for action in Action], dim=1)
