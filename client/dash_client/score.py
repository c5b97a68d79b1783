"""The log probability of a given output: the options to ask for it, and the answer. Knows no gRPC and no protobuf."""

from dataclasses import dataclass
from typing import TypedDict

from dash_client.types import Action, Decisions, DepthStatistics, GenerationStarted, Mode, TokenLogprobs, Usage


class ScoreOptions(TypedDict, total=False):
    """The keyword arguments of `score`; they mean what they mean in `GenerationOptions`."""

    mode: Mode | str | None
    """Mode "adaptive" scores along the path that a policy or plan takes; "exact" is full depth."""
    compute_budget: float | None
    """Upper bound on the mean cost, as a share of the full-depth token's, in (0, 1]."""
    policy_name: str | None
    """The policy that decides."""
    fixed_action: Action | str | None
    """In mode "fixed": the action of all layers."""
    logprobs: int | None
    """The number of most probable tokens that come back at each place, beside the given one, in [0, 20]."""
    return_decisions: bool | None
    """Return the action of every layer for every token."""
    trace: bool | None
    """Trace this request's decisions, whatever the server's sampling ratio."""


@dataclass(frozen=True, slots=True)
class Score:
    """The log probability of a given output, in nats."""

    log_probability: float
    """The log probability of the whole output."""
    is_greedy: bool
    """True if each token was the most probable one, so that greedy decoding would have put it out."""
    text: str
    token_ids: tuple[int, ...]
    """The tokens that were scored."""
    logprobs: tuple[TokenLogprobs, ...]
    """One entry per token."""
    usage: Usage
    depth: DepthStatistics
    decisions: Decisions | None
    """None without `return_decisions`."""
    started: GenerationStarted
