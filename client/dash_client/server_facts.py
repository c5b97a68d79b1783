"""The facts that a server tells of its model and policies. Knows nothing of gRPC or protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass

from dash_client.types import Action, Mode


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that a server serves, and its limits. Actions and modes that this client does not know are left out."""

    name: str
    architecture: str
    layer_count: int
    vocabulary_size: int
    context_length: int
    max_new_tokens_limit: int
    default_max_new_tokens: int
    cache_tokens: int
    slot_count: int
    actions: tuple[Action, ...]
    modes: tuple[Mode, ...]
    default_mode: Mode
    policy_names: tuple[str, ...]
    default_policy_name: str
    default_draft_policy_name: str
    """The policy that drafts in mode "exact"."""
    device: str
    is_compiled: bool
    """True if decoding runs native code."""
    weight_error: float
    """How far the weights of the highest action are from the model's own: the root of the mean squared difference, as a
    share of theirs. 0 if that action is FULL."""


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy that a server offers."""

    name: str
    note: str
    learned: bool
    lookahead: int
    pinned_layers: tuple[int, ...]
    action_costs: Mapping[Action, float]
    """Measured cost of each action as a share of a full layer."""
    lowest_budget: float
    """The lowest compute budget that the policy can keep."""
    recommended_budget: float
    """The compute budget in use if neither the request nor the server sets one."""
    compensation: str
    is_drafter: bool
    """True if the policy was made to draft for mode "exact"."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The comparison of an answer in mode "adaptive" with full depth, which ran the same tokens after the first."""

    request_id: str
    policy: str
    compute_budget: float | None
    token_count: int
    """Tokens compared."""
    agreement: float
    """Share of these at which both would put out the same token, if greedy."""
    logprob_gap: float
    """Mean log probability of the tokens that were put out, less full depth's, in nats."""
    divergence: float
    """Mean Kullback-Leibler divergence from full depth in nats, over the 20 most probable tokens and the rest as one:
    at most the whole one."""
    calibrated_divergence: float | None
    """The policy's divergence at this budget when it was calibrated; None if nobody knows."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The load of a server at one moment, of all callers."""

    running_request_count: int
    waiting_request_count: int
    slot_count: int
    """Slots of the workers that take requests; 0 if none does."""
    worker_count: int
    token_count: int
    """Prompt and output tokens, as far as the requests may go, of all requests inside."""
    token_limit: int
    cache_token_count: int
    """KV cache tokens that running requests have reserved."""
    cache_token_limit: int
    decode_tokens_per_second: float | None
    """Speed of one stream after its first token: the median of the latest requests. None before any."""
    prefill_tokens_per_second: float | None
    """Prompt tokens a second: the median of the latest requests. None before any."""
    is_draining: bool
    """True if the server is shutting down."""
