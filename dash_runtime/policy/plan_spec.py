"""The terms on which tokens are planned: the same in training, evaluation, a policy's file and serving.

Knows layers, actions and costs; knows no networks, no compensation and no files.
"""

from dataclasses import dataclass
from functools import cached_property

from dash_runtime.actions import Action, CostTable
from dash_runtime.policy.policy import cheapest_kernel, decision_blocks


@dataclass(frozen=True)
class PlanSpec:
    """The terms of a policy: the layers that it decides, the actions, the layers that it sees, and the costs."""

    actions: tuple[Action, ...]
    """The actions to choose from, in the order of the network's scores."""
    pinned: frozenset[int]
    """Layers that are never decided, all below `lookahead` among them; they run `pinned_action`."""
    lookahead: int
    """Layers between the first layer of a block and the earlier one whose input decides it."""
    block_size: int
    """Layers that are decided together."""
    head: Action
    """Precision of the language-model head."""
    costs: CostTable
    pinned_action: Action = Action.FULL

    @classmethod
    def full_depth(cls, costs: CostTable) -> "PlanSpec":
        """The terms of full depth: every layer is pinned."""
        return cls(
            actions=(Action.FULL,),
            pinned=frozenset(range(costs.num_layers)),
            lookahead=1,
            block_size=1,
            head=Action.FULL,
            costs=costs,
        )

    @property
    def kv_action(self) -> Action:
        """See `policy.Policy`."""
        return cheapest_kernel((*self.actions, self.pinned_action))

    @property
    def num_layers(self) -> int:
        return self.costs.num_layers

    @cached_property
    def decision_blocks(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each block, ascending. The last block may be smaller than `block_size`."""
        return decision_blocks(self.num_layers, self.pinned, self.block_size)

    @cached_property
    def free_layers(self) -> tuple[int, ...]:
        """The layers that are decided, ascending."""
        return tuple(layer for block in self.decision_blocks for layer in block)
