"""The terms on which tokens are planned: the same in training, evaluation, a policy's file and serving.

Knows layers, actions and costs; knows no networks, no compensation and no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dash_runtime.actions import Action, CostTable
from dash_runtime.policy.policy import cheapest_kernel, decision_blocks


@dataclass(frozen=True)
class PlanSpec:
    """The terms of a policy: the layers that it decides, the actions, the layers that it sees, and the costs."""

    actions: tuple[Action, ...]
    """The actions to choose from, in the order of the network's scores."""
    pinned: Mapping[int, Action]
    """The action of each layer that is never decided; all layers below `lookahead` are among them."""
    lookahead: int
    """Layers between the first layer of a block and the earlier one whose input decides it."""
    block_size: int
    """Layers that are decided together."""
    head: Action
    """Precision of the language-model head; SKIP is the narrow one."""
    costs: CostTable

    @classmethod
    def fixed(cls, plan: Sequence[Action], head: Action, costs: CostTable) -> "PlanSpec":
        """The terms of a fixed plan: every layer is pinned."""
        actions = tuple(sorted(set(plan)))
        return cls(actions, dict(enumerate(plan)), lookahead=1, block_size=1, head=head, costs=costs)

    @property
    def kv_action(self) -> Action:
        """See `policy.Policy`."""
        return cheapest_kernel((*self.actions, *self.pinned.values()))

    @property
    def num_layers(self) -> int:
        return self.costs.num_layers

    @cached_property
    def decision_blocks(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each block, ascending. The last block may be smaller than `block_size`."""
        return decision_blocks(self.num_layers, frozenset(self.pinned), self.block_size)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a network that decides on these terms, for one token."""
        return len(self.decision_blocks)

    @cached_property
    def free_layers(self) -> tuple[int, ...]:
        """The layers that are decided, ascending."""
        return tuple(layer for block in self.decision_blocks for layer in block)
