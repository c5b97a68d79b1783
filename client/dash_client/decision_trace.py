"""What was decided and when, step by step, for one request: plain frozen dataclasses.

Knows nothing of gRPC or protobuf. All times are the worker's, in nanoseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from dash_client.types import Action, Mode


class StepKind(StrEnum):
    """What a recorded step did."""

    DECODE = "decode"
    """One token at the depth that was decided, put out at once."""
    DRAFT = "draft"
    """One token in mode "exact", to be verified."""
    VERIFICATION = "verification"
    """A draft's tokens, verified at full depth."""


@dataclass(frozen=True, slots=True)
class RecordedDecision:
    """What decided a layer: one evaluation of the policy. Layers that were decided at once share its times."""

    start_ns: int
    """When it began, from the step's start."""
    end_ns: int
    """When it was done, from the step's start."""
    scores: Mapping[Action, float] | None
    """The policy's score of each action for this layer. None where the policy gives none."""


@dataclass(frozen=True, slots=True)
class RecordedLayer:
    """One layer of one step."""

    action: Action
    start_ns: int
    """When it began, from the step's start."""
    end_ns: int
    """When its work was done or, on an accelerator, queued; from the step's start."""
    decision: RecordedDecision | None
    """None for a layer without one: it is pinned, or the step ran at full depth."""
    exposed_ns: int
    """How long the decoder waited for the decision, or spent on it inline; counted at a block's first layer."""
    cost_spent: float | None
    """Share of a full-depth token's cost spent before this layer. None where it was not recorded."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One way through the layers."""

    kind: StepKind
    token_ids: tuple[int, ...]
    """The tokens that it put out, drafted, or, in a verification, put out after it."""
    start_unix_ns: int
    """When it began, since 1970."""
    duration_ns: int
    """How long it took, the head and the choice of the token included."""
    layers: tuple[RecordedLayer, ...]
    """First layer first. Empty for a verification, which runs all of them in full."""
    accepted_token_count: int | None
    """Of a verification: how many of the tokens drafted since the last one it accepted."""


@dataclass(frozen=True, slots=True)
class RecordedDecisions:
    """The recorded steps of one request. The first token, which comes from the prefill, is in none of them."""

    request_id: str
    model: str
    policy: str
    mode: Mode
    compute_budget: float | None
    """Modes "adaptive" and "exact": the compute budget in use, a share of the full-depth token."""
    price_of_compute: float | None
    """The price of compute that the policy was given for the budget. None where it knows none."""
    layer_count: int
    pinned_layers: tuple[int, ...]
    """Layers that the policy does not decide."""
    score_actions: tuple[Action, ...]
    """The actions that have scores. Empty where the policy gives none."""
    steps: tuple[RecordedStep, ...]
    """The request's first steps, in order."""
    unrecorded_step_count: int
    """Steps after those, which were not recorded."""
