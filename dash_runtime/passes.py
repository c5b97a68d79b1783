"""A pass: what its rows run, how far it may go, and what came of it.

A pass takes one or more rows of one or more sequences through all layers and the head. Decoding, guesses, verification
and prompts are passes with other arguments, and every backend takes and gives what is here
(`decoder.backends.backend`). Knows actions and tensors; knows no models, no policies and no requests.
"""

import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.devices.step_timer import StepTimer

if TYPE_CHECKING:
    import numpy

_T = TypeVar("_T")

LONGEST_MATCH, MOST_GUESSES = 16, 7
"""The last tokens that are looked for in a text, at most; and the most guesses of a pass, since kernels take rows in
groups of up to eight, and a head in INT4 is for up to ten."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Network:
    """A policy's network that a pass may evaluate: float32 tensors, by the names and in the shapes of
    `policy.network.PolicyNetwork`; its `hidden_weight` has bf16 numbers.

    Its `num_known` facts come first. `blocks` are the layers of each decision block, `actions` what a score is of, and
    `layer_costs` what the share of cost that a row has spent is counted by.
    """

    by_name: Mapping[str, Tensor]
    num_known: int
    num_layers: int
    blocks: Sequence[tuple[int, ...]]
    actions: Sequence[Action]
    layer_costs: Mapping[Action, float]

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]


class RowPlan(NamedTuple):
    """The plan of one row: its pinned layers, and the network that decides the others within the pass, if any does."""

    pinned: Mapping[int, Action]
    network: Network | None = None
    facts: Tensor | None = None
    """Float32 memory for what the network is told: the known facts and others, then each action's price."""


class LayerDecider(Protocol):
    """Decides layers of some rows between a pass's layers."""

    @property
    def rows(self) -> Sequence[int]:
        """Its rows in the pass, ascending."""

    def actions(self, layer: int) -> Sequence[Action]:
        """Returns its rows' actions at `layer`; waits for them if need be."""

    def observe(self, layer: int, hidden: Tensor, actions: Sequence[Action]) -> None:
        """Shows it the layer's input, `[rows of the pass, hidden_size]`, and all rows' actions there."""


class Planner(Protocol):
    """Changes the rows' actions for one layer, if all are better off."""

    @property
    def latencies(self) -> LatencyTable | None:
        """The table by which it does, for who does it likewise (`engine.planner.GroupPlanner`); None if there is
        none."""

    def agree(self, actions: Sequence[Action]) -> Sequence[Action]:
        """Returns the actions to run, row by row."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PassPlan:
    """The plan of a pass. A pass is quicker with the plan and the batch of the one before."""

    rows: Sequence[RowPlan]
    """Each row's, or one for all."""
    heads: Sequence[Action] = ()
    """Each row's precision of the head; empty for a pass that ends with the last layer."""
    deciders: Sequence[LayerDecider] = ()
    """Deciders of the layers that no row's plan pins, each for rows of its own; all rows have one, or none has."""
    planner: Planner | None = None
    attends_rounded: bool = False
    """True if rows attend in FULL as rounded layers do: they were raised to it."""
    wants_logits: bool = True
    """False if each row's likeliest token is enough."""
    on_layer: Callable[[], None] | None = None
    """Called after each layer of a pass that may take seconds."""
    shares_head: bool = True
    """False if each row's logits must have the bits that they have when it is alone, however many rows there are."""

    @classmethod
    def of(cls, plan: Sequence[Action], heads: Sequence[Action] = (), **others: Any) -> "PassPlan":
        """Returns the plan of rows that all run `plan`, one action by layer; `others` are further fields."""
        return cls([RowPlan(dict(enumerate(plan)))], heads, **others)

    def actions(self, layer: int, num_rows: int) -> Sequence[Action]:
        """Returns each row's action at `layer`."""
        if len(self.deciders) == 1:
            actions = self.deciders[0].actions(layer)
        elif self.deciders:
            actions = by_row([(decider.rows, decider.actions(layer)) for decider in self.deciders])
        elif len(self.rows) == 1:
            actions = (self.rows[0].pinned[layer],) * num_rows
        else:
            actions = [row.pinned[layer] for row in self.rows]
        return actions if self.planner is None else self.planner.agree(actions)

    def observe(self, layer: int, hidden: Tensor, actions: Sequence[Action]) -> None:
        """Shows those who decide the layer's input and its actions: later layers are decided while it runs."""
        for decider in self.deciders:
            decider.observe(layer, hidden, actions)


def by_row(parts: Sequence[tuple[Sequence[int], Sequence[_T]]]) -> list[_T]:
    """Returns one entry per row, from parts that each have some rows and their entries."""
    placed = {row: entry for rows, entries in parts for row, entry in zip(rows, entries, strict=True)}
    return [placed[row] for row in range(len(placed))]


class Draw(NamedTuple):
    """A token's draw: the temperature, what is kept of the likeliest tokens, and a number in [0, 1) that chooses."""

    temperature: float
    top_p: float
    min_p: float
    number: float
    top_k: int
    """0 for all."""


DrawTokens = Callable[[Tensor, Mapping[int, Draw]], list[int]]
"""Draws a token for each of some rows of float32 logits `[rows, vocab_size]`, which lie one behind the other."""


class TextGuesses(NamedTuple):
    """The guesses of a lone row's passes (`engine.guesses`): what followed their last tokens before."""

    text: "numpy.ndarray"
    """The tokens so far, int32."""
    numbers: Sequence[int]
    """The number of guesses, by how many of the last tokens the text had before, from 0 to `LONGEST_MATCH`."""
    num_left: int
    """Tokens that may follow."""
    plan: PassPlan
    """That of passes with guesses, which decides nothing."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The end of a lone row's call: up to `count` tokens, each the likeliest after the one before, or drawn. None
    follows one of `end_ids`, or begins once somebody has written to `wake_file`. With guesses the last pass may
    put out more."""

    count: int
    end_ids: Collection[int] = ()
    draws: Sequence[Draw] = ()
    """Each token's, and those of what the last pass may put out; none if none is drawn."""
    wake_file: int | None = None
    """A file descriptor."""
    guesses: TextGuesses | None = None

    @property
    def most(self) -> int:
        """The most tokens that it may put out."""
        return self.count if self.guesses is None else self.count + MOST_GUESSES


class PassRecord(Protocol):
    """What passes leave for traces, by the place of a row or token in their result."""

    def layer_times(self, place: int) -> array:
        """Returns when each layer began and ended, by `perf_counter_ns`. To be read once the tokens are on the host."""

    def times(self, place: int) -> tuple[int, int]:
        """Returns when its pass began, and when its token was chosen, by `perf_counter_ns`: now, if that was not done
        within the call."""

    def scores(self, place: int) -> bytes | None:
        """Returns the scores with which the pass decided layers, float32 `[num_layers, actions]`; None if it decided
        none. To be read before the next pass."""


class OnePass:
    """The record of one pass, by row.

    Args:
        timer: two marks per layer: when it began, and when it was done; by the host's clock on a device that only
            queues work, when it was queued.
        scores: returns those of a row.
    """

    def __init__(self, timer: StepTimer, started_ns: int, scores: Callable[[int], bytes | None] | None = None) -> None:
        self.timer = timer
        self._started_ns, self._scores = started_ns, scores

    def layer_times(self, place: int) -> array:
        return self.timer.times()

    def times(self, place: int) -> tuple[int, int]:
        return self._started_ns, time.perf_counter_ns()

    def scores(self, place: int) -> bytes | None:
        return None if self._scores is None else self._scores(place)


@dataclass(slots=True)
class PassResult:
    """What came of one pass, by row; or of the passes of a lone row up to a limit, by token."""

    token_ids: list[int]
    """Each row's likeliest token, empty without a head; the tokens in order, if there was a limit."""
    plans: list[bytes]
    """The actions that ran, a byte per layer."""
    record: PassRecord
    logits: Tensor | None = None
    """Float32 `[rows, vocab_size]`. May be missing if the plan wants none, or with a limit."""
    states: Tensor | None = None
    """Without logits, the last layer's output, `[rows, hidden_size]`; missing with a limit."""
    num_rows: list[int] = field(default_factory=list)
    """With a limit, the rows of its pass at each pass's first token, and 0 at its others."""
    num_positions: int = 0
    """With a limit, the positions that were written, those of wrong guesses too."""
