"""The recorded decisions of one request, step by step, with their times: plain frozen dataclasses.

Knows nothing of gRPC or protobuf. All times are the worker's, in nanoseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from dash_client.types import Action, Mode


class StepKind(StrEnum):
    """The kinds of a recorded step."""

    DECODE = "decode"
    """One output token, at the depth that was decided."""
    DRAFT = "draft"
    """One drafted token in mode "exact", before its verification."""
    VERIFICATION = "verification"
    """The verification of a draft's tokens at full depth."""


@dataclass(frozen=True, slots=True)
class RecordedDecision:
    """One evaluation of the policy, for one layer. Layers that were decided together share its times."""

    start_ns: int
    """Its start, from the step's start."""
    end_ns: int
    """Its end, from the step's start."""
    scores: Mapping[Action, float] | None
    """The policy's score of each action for this layer. None if the policy gives no scores."""


@dataclass(frozen=True, slots=True)
class RecordedLayer:
    """One layer of one step."""

    action: Action
    start_ns: int
    """Its start, from the step's start."""
    end_ns: int
    """The end of its work or, on an accelerator, of queueing it; from the step's start."""
    decision: RecordedDecision | None
    """None if the layer is pinned or the step ran at full depth."""
    exposed_ns: int
    """Time that the decoder waited for the decision, or spent on it inline; counted at a block's first layer."""
    cost_spent: float | None
    """Share of a full-depth token's cost spent before this layer. None if it was not recorded."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One pass through the layers."""

    kind: StepKind
    token_ids: tuple[int, ...]
    """The tokens that it put out or drafted; for a verification, those put out after it."""
    start_unix_ns: int
    """Its start, in nanoseconds since 1970."""
    duration_ns: int
    """Its duration, including the head and the choice of the token."""
    layers: tuple[RecordedLayer, ...]
    """First layer first. Empty for a verification, which runs all layers in full."""
    accepted_token_count: int | None
    """For a verification: the number of tokens drafted since the last one that it accepted."""
    text_token_count: int | None = None
    """For a verification: the number of its draft's tokens that came from the text itself, and are in no other step."""


@dataclass(frozen=True, slots=True)
class RecordedDecisions:
    """The recorded steps of one request. The first token is in none of them: it comes from the prefill."""

    request_id: str
    model: str
    policy: str
    mode: Mode
    compute_budget: float | None
    """In modes "adaptive" and "exact": the compute budget in use, as a share of the full-depth token."""
    price_of_compute: float | None
    """The price of compute that the policy was given for the budget. None if the policy takes none."""
    layer_count: int
    pinned_layers: tuple[int, ...]
    """The layers that the policy does not decide."""
    score_actions: tuple[Action, ...]
    """The actions that have scores. Empty if the policy gives no scores."""
    steps: tuple[RecordedStep, ...]
    """The request's first steps, in order."""
    unrecorded_step_count: int
    """Number of later steps, which were not recorded."""
