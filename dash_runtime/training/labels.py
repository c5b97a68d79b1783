"""Labels of a policy's network: the damage that each action does, measured.

Transitions are deterministic and full depth is a dense teacher, so the cost-to-go of an action need not be estimated
from returns: one layer's action is changed for all tokens of a path, and each token's change of loss is read
(AggreVaTeD, Sun et al. 2017, with exact costs). Knows paths; knows no networks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.training.dense_decoder import Compensate, DenseDecoder, Text
from dash_runtime.training.loss import Loss
from dash_runtime.training.paths import Path, change_layer, skip_kernel

_FEWEST_FLIPPED_NATS = 1e-3
_FACTOR_RANGE = (1.0, 20.0)
_PRIOR_NATS = 20.0
"""The weight of all layers' factor in each layer's own, in nats of measured damage."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Measured differences, a row each: what `coarse` loses against `precise`, in nats, at `layer_place` of `block`.

    `hidden` is bfloat16 `[rows, hidden_size]`, `facts` float32 `[rows, num_facts]`, the rest `[rows]`; actions are
    places in the spec's actions.
    """

    block: Tensor
    layer_place: Tensor
    hidden: Tensor
    facts: Tensor
    coarse: Tensor
    precise: Tensor
    damage: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def joined(cls, parts: "list[Labels]") -> "Labels":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass
class SpoiltContext:
    """What a change costs in all, over what it costs the changed tokens themselves: a factor for each layer.

    Four fifths of what a well-chosen skip costs falls on later tokens, whose keys and values it spoils.
    """

    own: Tensor
    total: Tensor

    @classmethod
    def nothing(cls, num_layers: int) -> "SpoiltContext":
        return cls(torch.zeros(num_layers), torch.zeros(num_layers))

    def copy(self) -> "SpoiltContext":
        return SpoiltContext(self.own.clone(), self.total.clone())

    def factors(self) -> Tensor:
        """Returns float32 `[num_layers]`; 1 without measurements."""
        own, total = self.own.sum(), self.total.sum()
        if own < _FEWEST_FLIPPED_NATS:
            return torch.ones_like(self.own)
        overall = (total / own).clamp(*_FACTOR_RANGE)
        return ((self.total + _PRIOR_NATS * overall) / (self.own + _PRIOR_NATS)).clamp(*_FACTOR_RANGE)


@dataclass(frozen=True)
class Labeller:
    """Measures labels along one path."""

    decoder: DenseDecoder
    text: Text
    spec: PlanSpec
    compensate: Compensate
    path: Path
    facts: list[Tensor]
    """Each decision's facts, `[rows, num_facts]`."""
    loss: Loss

    @cached_property
    def own_loss(self) -> Tensor:
        """Loss along the path, `[batch, decided]`."""
        return self.loss(self.path.states[-1])

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        blocks = enumerate(self.spec.decision_blocks)
        return {layer: (number, place) for number, block in blocks for place, layer in enumerate(block)}

    def others(self, layer: int, action: Action) -> Tensor:
        """Returns what to run instead, `[batch, decided]`: `action`, or the cheapest kernel where the path skips."""
        own = self.path.actions[layer]
        return torch.where(own == int(Action.SKIP), int(skip_kernel(self.spec.actions)), int(action))

    def measure(self, layer: int, others: Tensor) -> tuple[Labels, Tensor]:
        """Returns the labels of a layer's other actions, and each token's change of loss, `[batch, decided]`."""
        own = self.path.actions[layer]
        change = self._changed_loss(layer, others, True) - self.own_loss
        rows = (own != others).flatten()
        places = torch.zeros(max(Action) + 1, dtype=torch.int64)
        for place, action in enumerate(self.spec.actions):
            places[action] = place
        ours, theirs, difference = own.flatten()[rows], others.flatten()[rows], change.flatten()[rows]
        number, place = self._places[layer]
        labels = Labels(
            block=torch.full_like(ours, number),
            layer_place=torch.full_like(ours, place),
            hidden=self.path.observations[number].hidden[rows].bfloat16(),
            facts=self.facts[number][rows],
            coarse=places[torch.minimum(ours, theirs)],
            precise=places[torch.maximum(ours, theirs)],
            damage=torch.where(theirs < ours, difference, -difference),
        )
        return labels, change

    def add_spoilt(
        self, spoilt: SpoiltContext, layer: int, others: Tensor, change: Tensor, generator: torch.Generator
    ) -> None:
        """Changes the layer for half of the tokens that do not skip it. Adds what they lose, and what all lose."""
        own = self.path.actions[layer]
        flipped = (own > others) & (torch.rand(own.shape, generator=generator) < 0.5)
        total = self._changed_loss(layer, torch.where(flipped, others, own), False) - self.own_loss
        spoilt.own[layer] += change[flipped].sum()
        spoilt.total[layer] += total.sum()

    def _changed_loss(self, layer: int, actions: Tensor, is_context_frozen: bool) -> Tensor:
        arguments = (self.decoder, self.text, self.spec, self.compensate, self.path, layer, actions)
        return self.loss(change_layer(*arguments, is_context_frozen))
