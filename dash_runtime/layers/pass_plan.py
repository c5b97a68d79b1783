"""A pass from tokens to logits as one call: what decides the layers, and what came of it. Knows no policies."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.rows.policy_rows import RowDecisions

Decided = tuple[Mapping[int, Action], RowDecisions | None]
"""A row's pinned layers, and what decides the others; None if there are none."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PassPlan:
    """The plan of a pass: each row's pinned layers and decisions, or one for all rows; and each row's head precision.

    By `latencies` several rows agree on actions (`engine.planner.GroupPlanner`); without them each has its own. With
    `attends_rounded` rows attend in FULL as rounded layers do: they were raised to it.
    """

    decided: Sequence[Decided]
    heads: Sequence[Action]
    latencies: LatencyTable | None = None
    attends_rounded: bool = False
    wants_logits: bool = True
    """False if each row's likeliest token is enough."""


@dataclass(frozen=True, slots=True)
class PassRun:
    """By row the likeliest token, and the actions that ran, a byte per layer.

    `layer_times` are those of `engine.step.StepOutput`.
    """

    logits: Tensor | None
    """Float32 `[rows, vocab_size]`; may be None if the plan wants none."""
    likeliest: list[int]
    states: Tensor | None
    """Without logits, the last layer's output, `[rows, hidden_size]`."""
    plans: list[bytes]
    layer_times: array
