"""What a policy is, and the policies that look at nothing: full depth, a fixed plan, a random plan.

A policy decides, for each row of a batch, the actions of a block of layers at once: of one layer, or of several where
evaluating it costs much beside a layer. Knows no lanes, no sequences and no decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.layers.compensation import Compensation, Identity

Actions = tuple[Action, ...]
"""One action per row."""

_WORD = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a row before its first layer."""

    seed: int
    """The sequence's own."""
    position: int
    """Of the token in its sequence."""
    price: float
    """The price of compute λ."""


@dataclass(slots=True)  # freezing would double what making one takes, seven times a token
class State:
    """What a policy sees: the input of an earlier layer than those it decides.

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
    """Share of a full-depth token spent up to the observed layer, that layer included."""


@dataclass(slots=True)
class Decision:
    """The actions of one block of layers, in order; `scores` is float32 `[rows, layers of the block, actions of the
    policy]`, where there are any."""

    plan: Sequence[Actions]
    scores: Tensor | None = None


Pending = Callable[[], Decision]
"""Reads a decision whose work is done."""


class Policy(Protocol):
    """Chooses what is done with each layer for each token."""

    @property
    def name(self) -> str: ...

    @property
    def lookahead(self) -> int:
        """A block of layers is decided from the input of the layer so many before its first."""

    @property
    def pinned(self) -> frozenset[int]:
        """Layers that it never decides; all below `lookahead` are among them."""

    @property
    def pinned_action(self) -> Action:
        """What pinned layers run: FULL, but for a policy that only drafts."""

    @property
    def block_size(self) -> int:
        """Layers that are decided together (`decision_blocks`)."""

    @property
    def score_actions(self) -> Actions:
        """The action of each score that it gives, in order; empty where it gives none."""

    @property
    def head(self) -> Action:
        """Precision of the language-model head."""

    @property
    def compensation(self) -> Compensation:
        """What stands in for a skipped layer."""

    def start(self, layer: int, state: State) -> Pending:
        """Starts choosing each row's actions in the block that begins with `layer`, from that row's own state only.

        On an accelerator the work is queued on the current stream without waiting; calling what is
        returned, once that work is done, reads the decision.
        """


@dataclass(frozen=True)
class FullDepth:
    """Every layer in full: all of them are pinned."""

    num_layers: int
    name: str = "full-depth"
    lookahead: int = 1
    block_size: int = 1
    head: Action = Action.FULL
    compensation: Compensation = field(default_factory=Identity)
    pinned_action: Action = Action.FULL
    score_actions: Actions = ()

    @property
    def pinned(self) -> frozenset[int]:
        return frozenset(range(self.num_layers))

    def start(self, layer: int, state: State) -> Pending:
        return lambda: Decision(((Action.FULL,) * len(state.tokens),))


@dataclass(frozen=True)
class FixedPlan:
    """The same plan for every token: one action per layer."""

    plan: Actions
    name: str
    head: Action
    compensation: Compensation
    pinned: frozenset[int]
    lookahead: int = 1
    block_size: int = 1
    pinned_action: Action = Action.FULL
    score_actions: Actions = ()

    def start(self, layer: int, state: State) -> Pending:
        return lambda: Decision(((self.plan[layer],) * len(state.tokens),))


@dataclass(frozen=True)
class RandomPlan:
    """Draws each action from the layer's own rates: the control that a learned policy must beat.

    `rates[layer]` maps actions to probabilities. The draw depends on the sequence's seed, the token's position
    and the layer only, so that a request gets the same plan whatever runs beside it.
    """

    rates: Sequence[Mapping[Action, float]]
    name: str
    head: Action
    compensation: Compensation
    pinned: frozenset[int]
    lookahead: int = 1
    block_size: int = 1
    pinned_action: Action = Action.FULL
    score_actions: Actions = ()

    def start(self, layer: int, state: State) -> Pending:
        return lambda: Decision((tuple(self._draw(layer, token) for token in state.tokens),))

    def _draw(self, layer: int, token: Token) -> Action:
        remaining = _uniform(token.seed, token.position, layer)
        for action, rate in self.rates[layer].items():
            remaining -= rate
            if remaining < 0:
                return action
        return max(self.rates[layer])  # the rates' sum was rounded to just below 1


@lru_cache
def decision_blocks(num_layers: int, pinned: frozenset[int], block_size: int) -> tuple[tuple[int, ...], ...]:
    """The layers that are not pinned, in groups of `block_size` that are decided together; the last may be smaller."""
    free = [layer for layer in range(num_layers) if layer not in pinned]
    return tuple(tuple(free[start : start + block_size]) for start in range(0, len(free), block_size))


def edges(num_layers: int) -> frozenset[int]:
    """The first and the last layer, which are always pinned: skipping them costs most."""
    return frozenset((0, num_layers - 1))


def fixed_action_plan(
    action: Action, costs: CostTable, compensation: Compensation, heads: Sequence[Action]
) -> FixedPlan:
    """Mode FIXED: one action for all layers but the edges.

    A quantised plan takes the INT8 head where there is one.
    """
    pinned = edges(costs.num_layers)
    plan = tuple(Action.FULL if layer in pinned else action for layer in range(costs.num_layers))
    is_quantized = action in (Action.INT4, Action.INT8)
    head = Action.INT8 if is_quantized and Action.INT8 in heads else Action.FULL
    name = f"fixed-{action.name.lower()}"
    return FixedPlan(plan=plan, name=name, head=head, compensation=compensation, pinned=pinned)


def _uniform(seed: int, position: int, layer: int) -> float:
    """A number in [0, 1) from three integers, by SplitMix64 (Steele et al. 2014): stateless and portable."""
    word = 0
    for part in (seed, position, layer):
        word = (word + part + 0x9E37_79B9_7F4A_7C15) & _WORD
        word = ((word ^ word >> 30) * 0xBF58_476D_1CE4_E5B9) & _WORD
        word = ((word ^ word >> 27) * 0x94D0_49BB_1331_11EB) & _WORD
        word ^= word >> 31
    return (word >> 11) / (1 << 53)
