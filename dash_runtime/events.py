"""Everything that the engine says about its requests, as messages that can go over a socket as they are.

Imports no torch: the server reads the same types. They are tagged msgspec structs, since msgspec can decode a union of
those, but not of dataclasses. Knows no engine and no transport.
"""

from enum import StrEnum

import msgspec

from dash_runtime.actions import Action
from dash_runtime.decision_trace import DecisionTrace


class EndReason(StrEnum):
    """Why a sequence ended."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, in nats, by the raw logits of the path that ran: before any logits processor,
    temperature or truncation."""

    chosen: float
    top: list[tuple[int, float]]
    """Token ids and their log probabilities, best first."""


class DepthStatistics(msgspec.Struct, frozen=True, array_like=True):
    """Counts and costs of one request's decode tokens. The first token, which the prefill made, is not one."""

    num_decode_tokens: int
    layer_action_counts: list[list[int]]
    """For each layer, the number of decode tokens that ran each action, in Action's order."""
    speculative_action_counts: dict[Action, int]
    """Layers that ran each action beside these: for drafts, and for guesses and drafted tokens that were rejected."""
    total_cost: float
    """In full-depth tokens, of all that ran."""
    exposed_ns: int
    """Time that the decoder lost to the policy."""

    @property
    def action_counts(self) -> dict[Action, int]:
        """Layers that ran each action for the decode tokens: as many for each token as the model has layers."""
        sums = (sum(counts[place] for counts in self.layer_action_counts) for place in range(len(Action)))
        return dict(zip(Action, sums, strict=True))

    @property
    def mean_cost(self) -> float:
        """Cost per decode token, as a share of a full-depth token; 1 without decode tokens."""
        return self.total_cost / self.num_decode_tokens if self.num_decode_tokens else 1.0

    @property
    def mean_exposed_seconds(self) -> float:
        """Seconds per decode token that the decoder lost to the policy; 0 without decode tokens."""
        return self.exposed_ns / 1e9 / self.num_decode_tokens if self.num_decode_tokens else 0.0


class SpeculationStatistics(msgspec.Struct, frozen=True, array_like=True):
    """Counts and times of one request's drafts in mode EXACT. In other modes its guesses count as drafts from the
    text: a pass with some verifies them, and they take no time of their own."""

    num_drafted: int
    """By the model and from the text."""
    num_drafted_from_text: int
    num_accepted_from_text: int
    accepted_lengths: list[int]
    """For each number of accepted tokens, from 0 on, the number of drafts of which so many were accepted."""
    draft_ns: int
    """Time of the steps that drafted, shared with the rows that ran beside it."""
    verification_ns: int

    @property
    def num_accepted(self) -> int:
        return sum(length * count for length, count in enumerate(self.accepted_lengths))

    @property
    def num_verifications(self) -> int:
        return sum(self.accepted_lengths)


class CostStatus(msgspec.Struct, frozen=True, array_like=True):
    """How well the cost table in force fits what steps take."""

    num_replacements: int = 0
    """Times that the table was replaced since the start."""
    error: float = 0.0
    """The largest difference between what a plan that ran is said to cost and what it takes, as a share of a
    full-depth token. 0 if nothing is known against the table."""


class SlotGranted(msgspec.Struct, frozen=True, tag=True):
    """The request has its slot."""

    request_id: str
    policy: str
    compute_budget: float | None
    queue_seconds: float
    """Time in the engine's own queue."""
    policy_note: str = ""
    """What a caller should know about the policy."""
    divergence: float | None = None
    """The policy's divergence from full depth at this budget, in nats per token, as calibrated; None: unknown."""
    prefill_action: Action = Action.FULL
    """The action of the prompt's tokens in all layers."""


class TokenProduced(msgspec.Struct, frozen=True, tag=True):
    """The request has one more output token."""

    request_id: str
    token_id: int
    plan: bytes = b""
    """One byte per layer: the action that ran. Empty unless the request asked for decisions."""
    logprobs: TokenLogprobs | None = None
    """None unless the request asked for them."""


class SequenceFinished(msgspec.Struct, frozen=True, tag=True):
    """The request is over and its slot is free."""

    request_id: str
    reason: EndReason
    num_output_tokens: int
    prefill_seconds: float
    """From the slot to the first token."""
    decode_seconds: float
    """From the first token to the end."""
    depth: DepthStatistics
    speculation: SpeculationStatistics | None = None
    """None if mode is not EXACT and nothing was guessed."""
    num_cached_prompt_tokens: int = 0
    """Prompt tokens whose keys and values came from an earlier request."""
    trace: DecisionTrace | None = None
    """None unless the engine records."""


class SequenceCancelled(msgspec.Struct, frozen=True, tag=True):
    """The request was cancelled while it had a slot. The slot is free."""

    request_id: str
    trace: DecisionTrace | None = None
    """None unless the engine records."""


class RequestRefused(msgspec.Struct, frozen=True, tag=True):
    """The request is wrong and was not queued: an `InvalidRequest`, for an engine behind a socket."""

    request_id: str
    field: str
    description: str


EngineEvent = SlotGranted | TokenProduced | SequenceFinished | SequenceCancelled | RequestRefused
