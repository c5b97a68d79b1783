"""The heart: runs one token of every row through the layers, and decides each layer while an earlier one is running.

Knows the decoder, policies and a lane; knows no slots and no requests.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TypeVar

from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import device_of
from dash_runtime.devices.step_timer import StepTimer
from dash_runtime.engine.lanes import Lane, Ticket
from dash_runtime.engine.planner import GroupPlanner, Planner
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.pass_plan import Decided, PassPlan
from dash_runtime.policy.policy import Actions, Policy, State, Token, decision_blocks

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The rows' float32 `[rows, vocab_size]` logits and plans, one byte per layer. Logits may be missing if the plan of
    the step wants none; `late_logits` then makes those of some rows.

    The timer has two marks per layer: when it began, and when it was done; by the host's clock on a device that only
    queues work, when it was queued.
    """

    logits: Tensor | None
    plans: list[bytes]
    timer: StepTimer
    known_likeliest: list[int] | None = None
    late_logits: Callable[[Sequence[int]], Tensor] | None = None

    @property
    def likeliest(self) -> list[int]:
        """Each row's token of the largest logit, to be read once."""
        if self.known_likeliest is not None:
            return self.known_likeliest
        assert self.logits is not None
        return device_of(self.logits.device).likeliest(self.logits)

    def logits_from(self, row: int) -> Tensor | None:
        """Returns the logits of a row and those behind it, if there are any."""
        return None if self.logits is None else self.logits[row:]

    @property
    def layer_times(self) -> array:
        """The times of the marks by `perf_counter_ns`. To be read once the tokens are on the host."""
        return self.timer.times()


@dataclass(frozen=True, slots=True)
class DecidedBlock:
    """A decision block: the layers that one evaluation of the policy decided, for all rows of a decider."""

    layers: tuple[int, ...]
    ticket: Ticket
    scores: Tensor | None
    """`[rows, layers, score actions]`; None without scores."""


def decode_step(
    decoder: Decoder,
    lane: Lane,
    batch: Batch,
    token_ids: Sequence[int],
    deciders: Sequence["Decider"],
    planner: Planner | None = None,
    has_exact_times: bool = False,
    plan: PassPlan | None = None,
) -> StepOutput:
    """Runs one token of every row through all layers. Each row belongs to one decider.

    Args:
        plan: `pass_plan` of the deciders and the planner, where the same rows run step after step.
    """
    plan = pass_plan(deciders, planner) if plan is None else plan
    if plan is not None and (run := decoder.run_pass(plan, token_ids, batch)) is not None:
        batch.commit()
        late_logits = None if run.states is None else partial(_some_logits, decoder, run.states, plan.heads)
        return StepOutput(run.logits, run.plans, StepTimer(run.layer_times), run.likeliest, late_logits)
    decider = deciders[0] if len(deciders) == 1 else _SeveralDeciders(deciders)
    hidden = decoder.start_pass(token_ids, batch)
    actions_by_layer: list[Sequence[Action]] = []
    timer = decoder.step_timer(has_exact_times)
    for layer in range(decoder.num_layers):
        actions = decider.actions(layer, lane)
        if planner is not None:
            actions = planner.agree(actions)
        # Later layers are decided from this layer's input while it runs.
        decider.observe(layer, hidden, actions, lane)
        timer.mark(2 * layer)
        hidden = decoder.run_layer(layer, actions, hidden, batch)
        timer.mark(2 * layer + 1)
        actions_by_layer.append(actions)
    batch.commit()
    plans = [bytes(plan) for plan in zip(*actions_by_layer, strict=True)]
    return StepOutput(decoder.logits(hidden, decider.heads), plans, timer)


def _some_logits(decoder: Decoder, states: Tensor, heads: Sequence[Action], rows: Sequence[int]) -> Tensor:
    return decoder.logits(states[rows], [heads[row] for row in rows])


def pass_plan(deciders: Sequence["Decider"], planner: Planner | None, wants_logits: bool = True) -> PassPlan | None:
    """Returns the plan of steps that can run in one call: nobody has a part between the layers. None if one has."""
    decided = [decider.decided for decider in deciders]
    if None in decided or not isinstance(planner, GroupPlanner | None):
        return None
    by_row = _SeveralDeciders(deciders)
    heads = by_row.heads
    if len(deciders) == 1 and deciders[0].is_blind:
        pinned = deciders[0].policy.pinned
        if planner is not None:
            agreed = {own: planner.agree((own,) * len(heads))[0] for own in set(pinned.values())}
            raised = {layer: agreed[own] for layer, own in pinned.items()}
            attends_rounded = Action.FULL not in pinned.values()
            return PassPlan([(raised, None)], heads, None, attends_rounded, wants_logits)
        return PassPlan([(pinned, None)], heads, wants_logits=wants_logits)
    latencies = None if planner is None else planner.latencies
    return PassPlan(by_row.decided, heads, latencies, wants_logits=wants_logits)


class Decider:
    """Asks one policy about its rows during a step, and keeps its decisions until their layers run.

    Args:
        rows: indices in the batch, ascending; no other decider has them.
        tokens: one per row.
        costs: the policy's own table, for the share of cost already spent.
    """

    def __init__(
        self, policy: Policy, rows: Sequence[int], tokens: Sequence[Token], costs: CostTable, num_rows: int
    ) -> None:
        self.policy = policy
        self.rows = list(rows)
        self._layer_costs = costs.layer
        self._num_layers = costs.num_layers
        self._has_all_rows = len(self.rows) == num_rows
        self.is_blind = len(policy.pinned) == self._num_layers
        """True if the policy decides nothing."""
        self._tickets: dict[int, tuple[tuple[int, ...], Ticket]] = {}
        self._decided: dict[int, Actions] = {}
        self.begin(tokens)

    def begin(self, tokens: Sequence[Token]) -> None:
        """Begins a step of the same rows with these tokens."""
        self._tokens = tokens
        self._cost_spent = [0.0] * len(self.rows)
        self._blocks: list[DecidedBlock] = []

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
        return len(self.blocks) if self.policy.score_actions else 0

    @property
    def decided(self) -> Sequence[Decided] | None:
        """Each row's pinned layers and decisions, if no layer has to ask this decider in between; None if one has."""
        return [(self.policy.pinned, None)] * len(self.rows) if self.is_blind else None

    @property
    def heads(self) -> Sequence[Action]:
        """Each row's precision of the head."""
        return (self.policy.head,) * len(self.rows)

    def actions(self, layer: int, lane: Lane) -> Sequence[Action]:
        """Returns each row's action at `layer`; waits for its decision unless the layer is pinned."""
        if layer in self._tickets:
            block, ticket = self._tickets.pop(layer)
            decision = lane.result(ticket)
            self._decided.update(zip(block, decision.plan, strict=True))
            self._blocks.append(DecidedBlock(block, ticket, decision.scores))
        return self._pinned[layer] if layer in self._pinned else self._decided.pop(layer)

    def observe(self, layer: int, hidden: Tensor, actions: Sequence[Action], lane: Lane) -> None:
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
        self._tickets[block[0]] = (block, lane.submit(self.policy, block[0], state))

    @property
    def blocks(self) -> Sequence[DecidedBlock]:
        """Decision blocks that were decided between layers so far, in order."""
        return self._blocks

    def scores_in_pass(self, row: int) -> bytes | None:
        """Returns the scores with which the last pass decided layers of a row (`RowDecisions.scores`); None if it
        decided none."""
        return None


@lru_cache  # every step asks for it
def _blocks_by_observed_layer(
    num_layers: int, pinned: frozenset[int], block_size: int, lookahead: int
) -> Mapping[int, tuple[int, ...]]:
    """Returns the decision blocks, each under the layer whose input its decision sees."""
    return {block[0] - lookahead: block for block in decision_blocks(num_layers, pinned, block_size)}


class _SeveralDeciders:
    """The deciders of a batch, asked as one."""

    def __init__(self, deciders: Sequence[Decider]) -> None:
        self._deciders = deciders

    @property
    def heads(self) -> Sequence[Action]:
        return self._by_row([decider.heads for decider in self._deciders])

    @property
    def decided(self) -> Sequence[Decided]:
        return self._by_row([decider.decided or () for decider in self._deciders])

    def actions(self, layer: int, lane: Lane) -> Sequence[Action]:
        return self._by_row([decider.actions(layer, lane) for decider in self._deciders])

    def observe(self, layer: int, hidden: Tensor, actions: Sequence[Action], lane: Lane) -> None:
        for decider in self._deciders:
            decider.observe(layer, hidden, actions, lane)

    def _by_row(self, by_decider: Sequence[Sequence[_T]]) -> list[_T]:
        """Returns one entry per row of the batch."""
        placed = {
            row: entry
            for decider, entries in zip(self._deciders, by_decider, strict=True)
            for row, entry in zip(decider.rows, entries, strict=True)
        }
        return [placed[row] for row in range(len(placed))]
