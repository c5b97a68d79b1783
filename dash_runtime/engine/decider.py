"""Asks a policy about its rows during a pass: each layer is decided while an earlier one is running.

Knows policies and a lane; knows no sequences and no layers' numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.lanes import Lane, Ticket
from dash_runtime.passes import PassPlan, Planner, RowPlan, by_row
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Actions, Policy, State, Token, decision_blocks


@dataclass(frozen=True, slots=True)
class DecidedBlock:
    """A decision block: the layers that one evaluation of the policy decided, for all rows of a decider."""

    layers: tuple[int, ...]
    ticket: Ticket
    scores: Tensor | None
    """`[rows, layers, score actions]`; None without scores."""


class Decider:
    """Asks one policy about its rows during a pass, and keeps its decisions until their layers run; a `LayerDecider`.

    A pass may evaluate some policies itself, layer after layer with nothing in between (`row_plans`). Then nobody asks
    here.

    Args:
        rows: indices in the batch, ascending; no other decider has them.
        tokens: one per row.
        costs: the policy's own table, for the share of cost already spent.
    """

    def __init__(
        self,
        policy: Policy,
        lane: Lane,
        rows: Sequence[int],
        tokens: Sequence[Token],
        costs: CostTable,
        num_rows: int,
    ) -> None:
        self.policy = policy
        self._lane = lane
        self.rows = list(rows)
        self._layer_costs = costs.layer
        self._num_layers = costs.num_layers
        self._has_all_rows = len(self.rows) == num_rows
        self.is_blind = len(policy.pinned) == self._num_layers
        """True if the policy decides nothing."""
        self._tickets: dict[int, tuple[tuple[int, ...], Ticket]] = {}
        self._decided: dict[int, Actions] = {}
        self._decides_in_pass = isinstance(policy, LearnedPolicy) and policy.decides_in_pass
        own = [policy.new_row() for _ in rows] if isinstance(policy, LearnedPolicy) and self._decides_in_pass else []
        self._facts = [facts for facts, _ in own]
        self.row_plans: Sequence[RowPlan] = [plan for _, plan in own] or [RowPlan(policy.pinned)] * len(self.rows)
        """Each row's plan, as far as that is known before the pass or the pass can decide it."""
        self.begin(tokens)

    def begin(self, tokens: Sequence[Token]) -> None:
        """Begins a step of the same rows with these tokens."""
        self._tokens = tokens
        self._cost_spent = [0.0] * len(self.rows)
        self.blocks: list[DecidedBlock] = []
        """Decision blocks that were decided between layers so far, in order."""
        for facts, token in zip(self._facts, tokens, strict=False):
            facts.begin(token)

    @cached_property
    def _asks_for(self) -> Mapping[int, tuple[int, ...]]:
        own = self.policy
        return _blocks_by_observed_layer(self._num_layers, frozenset(own.pinned), own.block_size, own.lookahead)

    @cached_property
    def _pinned(self) -> Mapping[int, Actions]:
        return {layer: (action,) * len(self.rows) for layer, action in self.policy.pinned.items()}

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a learned policy so far; other policies take no time worth counting."""
        if self._decides_in_pass:
            return self.policy.num_evaluations
        return len(self.blocks) if self.policy.score_actions else 0

    @property
    def heads(self) -> Sequence[Action]:
        """Each row's precision of the head."""
        return (self.policy.head,) * len(self.rows)

    def actions(self, layer: int) -> Sequence[Action]:
        """Returns each row's action at `layer`; waits for its decision unless the layer is pinned."""
        if layer in self._tickets:
            block, ticket = self._tickets.pop(layer)
            decision = self._lane.result(ticket)
            self._decided.update(zip(block, decision.plan, strict=True))
            self.blocks.append(DecidedBlock(block, ticket, decision.scores))
        return self._pinned[layer] if layer in self._pinned else self._decided.pop(layer)

    def observe(self, layer: int, hidden: Tensor, actions: Sequence[Action]) -> None:
        """Shows the policy the layer's input and actions, and asks it for the decision block that begins `lookahead`
        layers later, if one does.

        `hidden` is `[batch rows, hidden_size]`; `actions` has one action per row of the batch.
        """
        if self.is_blind:
            return
        taken = tuple(actions) if self._has_all_rows else tuple([actions[row] for row in self.rows])
        self._cost_spent = [
            spent + self._layer_costs[action] for spent, action in zip(self._cost_spent, taken, strict=True)
        ]
        block = self._asks_for.get(layer)
        if block is None:
            return
        own = hidden if self._has_all_rows else hidden[self.rows]
        state = State(self._tokens, own, layer, taken, self._cost_spent)
        self._tickets[block[0]] = (block, self._lane.submit(self.policy, block[0], state))


def plan_of(deciders: Sequence[Decider], planner: Planner | None, wants_logits: bool = True) -> PassPlan:
    """Returns the plan of passes whose rows these deciders have."""
    heads = by_row([(decider.rows, decider.heads) for decider in deciders])
    if len(deciders) > 1 or not deciders[0].is_blind:
        rows = by_row([(decider.rows, decider.row_plans) for decider in deciders])
        return PassPlan(rows, heads, deciders, planner, wants_logits=wants_logits)
    pinned, attends_rounded = deciders[0].policy.pinned, False
    if planner is not None:  # rows that are alike are raised alike
        agreed = {own: planner.agree((own,) * len(heads))[0] for own in set(pinned.values())}
        attends_rounded = Action.FULL not in pinned.values()
        pinned = {layer: agreed[own] for layer, own in pinned.items()}
    return PassPlan([RowPlan(pinned)], heads, attends_rounded=attends_rounded, wants_logits=wants_logits)


@lru_cache  # every step asks for it
def _blocks_by_observed_layer(
    num_layers: int, pinned: frozenset[int], block_size: int, lookahead: int
) -> Mapping[int, tuple[int, ...]]:
    """Returns the decision blocks, each under the layer whose input its decision sees."""
    return {block[0] - lookahead: block for block in decision_blocks(num_layers, pinned, block_size)}
