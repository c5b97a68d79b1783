"""The interface of a policy, and the policies that ignore the state: fixed plans and random draws.

A policy decides the actions of a block of layers at once, for each row of a batch. A block has several layers if an
evaluation costs much beside a layer. Knows no lanes, no sequences and no decoder.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.compensation import Compensation, Identity

Actions = tuple[Action, ...]
"""One action per row."""

FULL_DEPTH_NAME = "full-depth"
_WORD = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Token:
    """The facts of a row that are known before its first layer."""

    seed: int
    """The sequence's seed."""
    position: int
    """Place of the token in its sequence."""
    price: float
    """The price of compute λ."""


@dataclass(slots=True)  # not frozen: that would double the time of making one, seven times a token
class State:
    """The view of a policy: the input of a layer before those that it decides.

    Shapes: `hidden` is `[rows, hidden_size]`; the sequences have one entry per row.
    """

    tokens: Sequence[Token]
    hidden: Tensor
    """Input of layer `observed`, never written to again."""
    observed: int
    """The layer whose input this is: `lookahead` before the first one to decide."""
    actions: Actions
    """Action of the observed layer: the last one known."""
    cost_spent: Sequence[float]
    """Share of a full-depth token spent up to and including the observed layer."""


@dataclass(slots=True)
class Decision:
    """The actions of one block of layers, in order.

    `scores` is float32 `[rows, layers of the block, actions of the policy]` on the host, or None for a policy without
    scores.
    """

    plan: Sequence[Actions]
    scores: Tensor | None = None


Pending = Callable[[], Decision]
"""Returns a decision. To be called once its work is done."""


class Policy(Protocol):
    """Chooses the action of each layer for each token."""

    @property
    def name(self) -> str: ...

    @property
    def lookahead(self) -> int:
        """Layers between the first layer of a block and the earlier one whose input decides it."""

    @property
    def pinned(self) -> Mapping[int, Action]:
        """The action of each layer that it never decides; all layers below `lookahead` are among them."""

    @property
    def block_size(self) -> int:
        """Layers that are decided together (`decision_blocks`)."""

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a network for one token; 0 if it has none."""

    @property
    def score_actions(self) -> Actions:
        """The action of each score, in order; empty if the policy gives no scores."""

    @property
    def head(self) -> Action:
        """Precision of the language-model head."""

    @property
    def compensation(self) -> Compensation:
        """Replacement for the output of a skipped layer."""

    @property
    def kv_action(self) -> Action:
        """Projects a skipped layer's keys and values: the cheapest kernel that the policy may use."""

    def start(self, layer: int, state: State) -> Pending:
        """Starts choosing each row's actions in the block that begins with `layer`, from that row's own state only.

        On an accelerator the work is queued on the current stream without waiting. The returned function reads the
        decision; call it once that work is done.
        """


@dataclass(frozen=True)
class FixedPlan:
    """The same plan for every token: one action per layer, all of them pinned."""

    plan: Actions
    name: str
    head: Action
    compensation: Compensation
    lookahead: int = 1
    block_size: int = 1
    num_evaluations: int = 0
    score_actions: Actions = ()

    @cached_property
    def pinned(self) -> Mapping[int, Action]:
        return dict(enumerate(self.plan))

    @cached_property
    def kv_action(self) -> Action:
        return cheapest_kernel(self.plan)

    def start(self, layer: int, state: State) -> Pending:
        raise AssertionError("a fixed plan decides nothing")


@dataclass(frozen=True)
class RandomPlan:
    """Draws each action at the layer's own rates: the control that a learned policy must beat.

    `rates[layer]` maps actions to probabilities. A draw depends only on the sequence's seed, the token's position and
    the layer, so that a request gets the same plan whatever runs beside it.
    """

    rates: Sequence[Mapping[Action, float]]
    name: str
    head: Action
    compensation: Compensation
    pinned: Mapping[int, Action]
    lookahead: int = 1
    block_size: int = 1
    num_evaluations: int = 0
    score_actions: Actions = ()

    @cached_property
    def kv_action(self) -> Action:
        return cheapest_kernel([*self.pinned.values(), *(action for rates in self.rates for action in rates)])

    def start(self, layer: int, state: State) -> Pending:
        return lambda: Decision((tuple(self._draw(layer, token) for token in state.tokens),))

    def _draw(self, layer: int, token: Token) -> Action:
        remaining = _uniform(token.seed, token.position, layer)
        for action, rate in self.rates[layer].items():
            remaining -= rate
            if remaining < 0:
                return action
        return max(self.rates[layer])  # rounding left the sum of the rates just below 1


@lru_cache
def decision_blocks(num_layers: int, pinned: frozenset[int], block_size: int) -> tuple[tuple[int, ...], ...]:
    """Returns the layers that are not pinned in groups of `block_size` that are decided together; the last may be
    smaller."""
    free = [layer for layer in range(num_layers) if layer not in pinned]
    return tuple(tuple(free[start : start + block_size]) for start in range(0, len(free), block_size))


def cheapest_kernel(actions: Iterable[Action]) -> Action:
    """Returns the cheapest of these actions that runs a kernel; FULL if there is none."""
    return min((action for action in actions if action is not Action.SKIP), default=Action.FULL)


def full_edges(num_layers: int, highest: Action = Action.FULL) -> dict[int, Action]:
    """Returns the first and the last layer, pinned to the highest action: skipping them hurts most."""
    return {0: highest, num_layers - 1: highest}


def full_depth(num_layers: int, highest: Action = Action.FULL, head: Action = Action.FULL) -> FixedPlan:
    """Returns the plan of full depth: every layer in the highest action, and the finest head."""
    return FixedPlan((highest,) * num_layers, FULL_DEPTH_NAME, head, Identity())


def fixed_action_plan(
    action: Action,
    num_layers: int,
    compensation: Compensation,
    heads: Sequence[Action],
    highest: Action = Action.FULL,
) -> FixedPlan:
    """Returns the plan of mode FIXED: one action for all layers. SKIP leaves the first and the last in the highest."""
    kept = full_edges(num_layers, highest) if action is Action.SKIP else {}
    plan = tuple(kept.get(layer, action) for layer in range(num_layers))
    return FixedPlan(plan, f"fixed-{action.name.lower()}", fixed_head(action, heads), compensation)


def fixed_head(action: Action, heads: Sequence[Action]) -> Action:
    """Returns the head's precision beside one action in all layers: a quantised plan takes the head of its own
    precision, or of the next finer one that there is."""
    return max(heads, default=Action.FULL) if action in (Action.SKIP, Action.FULL) else own_or_finer(action, heads)


def own_or_finer(head: Action, heads: Sequence[Action]) -> Action:
    """Returns this precision of the head if a device has it, or the next finer one that there is."""
    return min((own for own in heads if own >= head), default=max(heads, default=Action.FULL))


def _uniform(seed: int, position: int, layer: int) -> float:
    """Returns a number in [0, 1) from three integers, by SplitMix64 (Steele et al. 2014): stateless and portable."""
    word = 0
    for part in (seed, position, layer):
        word = (word + part + 0x9E37_79B9_7F4A_7C15) & _WORD
        word = ((word ^ word >> 30) * 0xBF58_476D_1CE4_E5B9) & _WORD
        word = ((word ^ word >> 27) * 0x94D0_49BB_1331_11EB) & _WORD
        word ^= word >> 31
    return (word >> 11) / (1 << 53)
