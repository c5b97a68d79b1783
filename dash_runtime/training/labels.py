"""Labels of a policy's network: what each other action would cost, for every token and layer of a path at once.

Transitions are known and full depth is a dense teacher, so the cost-to-go of an action need not be estimated from
returns (AggreVaTeD, Sun et al. 2017). If an action leaves a layer's full output by `c`, the divergence of the whole
text grows by `½ (curvature · c)²` to second order, in the mean over the draws of `curvature` (`loss.Judged`): the
tokens' draws are independent of each other, so cross terms vanish. One backward pass gives it for all layers. Later
tokens, whose context the change spoils, are in it: that is most of what a well-chosen skip costs.

The slope of the divergence along the path is left out. It would tell how skips add up, but a few tokens' noise drowns
it, and what it is in the mean a price can take in. Knows paths and gradients; knows no networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.policy.network import facts_of
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.training.dense_decoder import Compensate, DenseDecoder
from dash_runtime.training.paths import Path


@dataclass(frozen=True, slots=True)
class Labels:
    """Measured costs of actions against FULL, in nats, a row each.

    `action` is a place in the spec's actions, `layer_place` one in `block`. `hidden` is `[rows, hidden_size]`, `facts`
    float32 `[rows, num_facts]`, the rest `[rows]`.
    """

    block: Tensor
    layer_place: Tensor
    hidden: Tensor
    facts: Tensor
    action: Tensor
    damage: Tensor

    def rows(self, picked: Tensor) -> "Labels":
        """Returns some of the rows, by number."""
        return Labels(*(getattr(self, name)[picked] for name in self.__slots__))

    @classmethod
    def joined(cls, parts: "Sequence[Labels]") -> "Labels":
        """Returns the rows of all parts."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


@torch.no_grad()
def measure_labels(
    decoder: DenseDecoder,
    spec: PlanSpec,
    compensate: Compensate,
    path: Path,
    curvatures: Sequence[Tensor],
    log_prices: Tensor,
    kernels: Sequence[Action],
) -> Labels:
    """Returns the labels of skipping each layer that is decided, and of one kernel in each.

    Args:
        curvatures: `Judged.curvature` carried back to each layer's output, `[batch, length, hidden_size]`.
        log_prices: log λ of each decided token, `[rows]`.
        kernels: the kernel of each layer; FULL to measure none there, which costs a pass of the layer less.
    """
    parts: list[Labels] = []
    for number, (block, seen) in enumerate(zip(spec.decision_blocks, path.observations, strict=True)):
        facts = facts_of(seen.last_actions, seen.cost_spent, log_prices, len(Action))
        for place, layer in enumerate(block):
            hidden, curvature = path.states[layer].detach(), path.decided(curvatures[layer]).float()
            full = path.decided(decoder.run_layer(layer, Action.FULL, hidden)).float()
            for action in dict.fromkeys((Action.SKIP, kernels[layer])):
                if action is Action.FULL or action not in spec.actions:
                    continue
                if action is Action.SKIP:
                    other = compensate(layer, path.decided(hidden))
                else:
                    other = path.decided(decoder.run_layer(layer, action, hidden))
                damage = (curvature * (other.float() - full)).sum(-1).square() / 2
                numbers = torch.full((3, len(damage)), number)
                numbers[1], numbers[2] = place, spec.actions.index(action)
                parts.append(Labels(numbers[0], numbers[1], seen.hidden, facts, numbers[2], damage))
    return Labels.joined(parts)
