"""Decisions that do not pay for their evaluation are left out, and the others stay what they were."""

from dataclasses import replace

import torch

from dash_runtime.actions import Action
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.training.prune import pin_settled_layers
from tests.runtime.support import some_costs

SKIPPED = {1: 0.5, 2: 0.001, 3: 0.0, 4: 0.2}


def some_policy(evaluation: float = 0.002, block_size: int = 1) -> tuple[PlanSpec, PolicyNetwork]:
    costs = replace(some_costs(), evaluation=evaluation)
    pinned = dict.fromkeys((0, 5), Action.FULL)
    spec = PlanSpec((Action.SKIP, Action.FULL), pinned, 1, block_size, Action.FULL, costs)
    shapes = PolicyNetwork.shapes(len(spec.decision_blocks), block_size, 2, 8, len(Action), 16, 8)
    return spec, PolicyNetwork(*(torch.randn(shape) for shape in shapes.values()))


def some_rates() -> torch.Tensor:
    rates = torch.zeros(6, len(Action))
    for layer in range(6):
        rates[layer, Action.SKIP - 1] = SKIPPED.get(layer, 0.0)
        rates[layer, Action.FULL - 1] = 1 - SKIPPED.get(layer, 0.0)
    return rates


def test_a_layer_that_is_hardly_ever_skipped_is_pinned_to_what_it_runs() -> None:
    spec, network = some_policy()
    pruned, smaller = pin_settled_layers(spec, network, some_rates())
    assert pruned.free_layers == (1, 4)
    assert pruned.pinned == dict.fromkeys((0, 2, 3, 5), Action.FULL)
    hidden, facts = torch.randn(3, 8), torch.randn(3, len(Action) + 3)
    for before, after in ((0, 0), (3, 1)):
        assert torch.equal(network.log_damages(before, hidden, facts), smaller.log_damages(after, hidden, facts))


def test_a_layer_that_is_always_skipped_at_the_dearest_price_stays_free_to_run_at_lower_ones() -> None:
    spec, network = some_policy()
    rates = some_rates()
    rates[3] = torch.tensor([1.0, 0, 0, 0, 0])
    assert pin_settled_layers(spec, network, rates)[0].free_layers == (1, 3, 4)


def test_the_layer_that_varies_most_stays_and_evaluations_for_nothing_all_stay() -> None:
    spec, network = some_policy(evaluation=0.9)
    assert pin_settled_layers(spec, network, some_rates())[0].free_layers == (1,)
    spec, network = some_policy(evaluation=0.0)
    assert pin_settled_layers(spec, network, some_rates())[0].free_layers == (1, 2, 4)


def test_blocks_of_several_layers_stay_as_they_are() -> None:
    spec, network = some_policy(block_size=2)
    assert pin_settled_layers(spec, network, some_rates()) == (spec, network)
