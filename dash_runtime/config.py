"""Frozen descriptions of a request and of the engine, validated when they are made.

Imports no torch: the server process builds these from protobuf messages. msgspec carries them to the worker, which
validates again by constructing them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from dash_runtime.actions import Action
from dash_runtime.constraint import Constraint
from dash_runtime.errors import ConfigError, InvalidRequest

MAX_LOGPROBS = 20
MOST_BURST_MILLISECONDS = 20
"""A reader sees no stutter of so much."""
BUDGET_SLACK = 0.05
"""A budget this little below the lowest is raised to it. Costs are corrected while serving, so the lowest budget that a
caller has read may have risen since."""
_LEAST_TEMPERATURE, _LEAST_PENALTY = 1e-5, 1 / 128
"""A logit over a smaller one may be no number. 1 / 128 is the power of two below 0.01, as single precision has it."""


class Mode(StrEnum):
    """The way in which a request's actions are chosen."""

    FULL_DEPTH = "full_depth"
    ADAPTIVE = "adaptive"
    EXACT = "exact"
    FIXED = "fixed"

    @property
    def has_policy(self) -> bool:
        """True if a policy decides."""
        return self in (Mode.ADAPTIVE, Mode.EXACT)


class LaneKind(StrEnum):
    """The place where the policy runs."""

    INLINE = "inline"
    CUDA_STREAM = "cuda_stream"


def _require_range(field_name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = math.isfinite(value) and (low < value if low_open else low <= value) and value <= high
    if not inside:
        bracket = "(" if low_open else "["
        raise InvalidRequest(field_name, f"must be in {bracket}{low:g}, {high:g}], got {value:g}")


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """Parameters of drawing a token from the logits. The defaults are greedy.

    Raises:
        InvalidRequest: a value is out of range or not finite.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _require_range("sampling.temperature", self.temperature, 0, 100)
        if self.temperature < _LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k < 0:
            raise InvalidRequest("sampling.top_k", f"must be 0 (all) or more, got {self.top_k}")
        _require_range("sampling.top_p", self.top_p, 0, 1, low_open=True)
        _require_range("sampling.min_p", self.min_p, 0, 1)
        _require_range("sampling.repetition_penalty", self.repetition_penalty, _LEAST_PENALTY, 100)
        _require_range("sampling.presence_penalty", self.presence_penalty, -100, 100)
        _require_range("sampling.frequency_penalty", self.frequency_penalty, -100, 100)
        for token_id, bias in self.logit_bias.items():
            _require_range(f"sampling.logit_bias[{token_id}]", bias, -100, 100)


@dataclass(frozen=True, slots=True)
class StoppingParameters:
    """Parameters of stopping, in token ids. Stop strings are the server's business.

    Raises:
        InvalidRequest: max_new_tokens is below 1.
    """

    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidRequest("stopping.max_new_tokens", f"must be at least 1, got {self.max_new_tokens}")

    def end_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Returns the tokens that end an output, of a model with these end-of-sequence tokens."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids


@dataclass(frozen=True, slots=True)
class SkipOptions:
    """Choice of what decides the layers' actions, and its options.

    Raises:
        InvalidRequest: a value is out of range, or an option does not belong to the mode.
    """

    mode: Mode = Mode.FULL_DEPTH
    compute_budget: float | None = None
    policy_name: str | None = None
    fixed_action: Action | None = None
    draft_length: int | None = None

    def __post_init__(self) -> None:
        if self.compute_budget is not None:
            _require_range("skip.compute_budget", self.compute_budget, 0, 1, low_open=True)
        for name, value, belongs in (
            ("compute_budget", self.compute_budget, self.mode.has_policy),
            ("policy_name", self.policy_name, self.mode.has_policy),
            ("fixed_action", self.fixed_action, self.mode is Mode.FIXED),
            ("draft_length", self.draft_length, self.mode is Mode.EXACT),
        ):
            if value is not None and not belongs:
                raise InvalidRequest(f"skip.{name}", f"does not apply to mode {self.mode.name}")
        if self.mode is Mode.FIXED and self.fixed_action is None:
            raise InvalidRequest("skip.fixed_action", "is required in mode FIXED")
        if self.draft_length is not None and self.draft_length < 1:
            raise InvalidRequest("skip.draft_length", f"must be at least 1, got {self.draft_length}")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate, in token ids.

    Raises:
        InvalidRequest: the prompt or the given output is empty, or `logprobs` is out of range.
    """

    request_id: str
    prompt_token_ids: list[int]
    stopping: StoppingParameters
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    skip: SkipOptions = field(default_factory=SkipOptions)
    logprobs: int | None = None
    return_decisions: bool = False
    constraint: Constraint | None = None
    scored_token_ids: list[int] | None = None
    """An output that is given: its tokens are put out, each with its log probability, and none is chosen."""
    is_immediate: bool = False
    """True if every token is wanted as soon as it is there, instead of with the sequence's next ones."""
    cache_namespace: str = ""
    """Requests of one namespace may reuse each other's prompts. Nothing else is ever shared."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InvalidRequest("prompt", "must not be empty")
        if self.scored_token_ids is not None and not self.scored_token_ids:
            raise InvalidRequest("continuation", "must not be empty")
        if self.logprobs is not None:
            _require_range("output.logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def num_cache_tokens(self) -> int:
        """Positions that the request may need at most, which its slot reserves."""
        return len(self.prompt_token_ids) + self.stopping.max_new_tokens


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts that requests are validated against, the same in the server and in the engine."""

    name: str
    architecture: str
    num_layers: int
    vocab_size: int
    context_length: int
    cache_tokens: int
    num_slots: int
    eos_token_ids: frozenset[int]
    actions: tuple[Action, ...]
    policies: tuple["PolicyFacts", ...]
    device: str
    has_native_code: bool = False
    """True if decoding runs native code."""
    weight_error: float = 0.0
    """How far the highest action's weights are from the model's own, as a share of theirs (root mean square)."""

    def validate(self, request: GenerationRequest) -> None:
        """Checks what depends on the model.

        Raises:
            InvalidRequest: a field does not fit the model; it is named.
        """
        self._validate_length(len(request.prompt_token_ids), request.stopping.max_new_tokens)
        in_order = {"token_ids": request.prompt_token_ids, "continuation": request.scored_token_ids or ()}
        for name, ordered in in_order.items():
            for position, token_id in enumerate(ordered):
                if not 0 <= token_id < self.vocab_size:
                    raise InvalidRequest(
                        f"{name}[{position}]", f"{token_id} is outside the vocabulary of {self.vocab_size}"
                    )
        for name, ids in (
            ("stopping.stop_token_ids", request.stopping.stop_token_ids),
            ("sampling.logit_bias", request.sampling.logit_bias),
        ):
            for token_id in ids:
                if not 0 <= token_id < self.vocab_size:
                    raise InvalidRequest(name, f"{token_id} is outside the vocabulary of {self.vocab_size}")
        self.validate_skip(request.skip)

    def _validate_length(self, prompt: int, max_new_tokens: int) -> None:
        room = min(self.context_length, self.cache_tokens)
        limit = "context length" if room == self.context_length else "key-value cache"
        if prompt >= room:
            raise InvalidRequest("prompt", f"has {prompt} tokens, but the {limit} is {room} with the output")
        if prompt + max_new_tokens > room:
            raise InvalidRequest(
                "stopping.max_new_tokens",
                f"{max_new_tokens} after a prompt of {prompt} tokens exceeds the {limit} of {room}",
            )

    @property
    def deepest(self) -> SkipOptions:
        """The options of full depth, or of the highest action in all layers where FULL is not offered."""
        if Action.FULL in self.actions:
            return SkipOptions(Mode.FULL_DEPTH)
        return SkipOptions(Mode.FIXED, fixed_action=max(self.actions))

    def validate_skip(self, skip: SkipOptions) -> None:
        """Checks what depends on the model's policies and their costs. Raises as `validate` does."""
        asked = Action.FULL if skip.mode is Mode.FULL_DEPTH else skip.fixed_action
        if asked is not None and asked not in self.actions:
            field = "skip.mode" if skip.mode is Mode.FULL_DEPTH else "skip.fixed_action"
            offered = ", ".join(action.name for action in self.actions)
            raise InvalidRequest(field, f"needs {asked.name}, which is not offered here; offered: {offered}")
        if not skip.mode.has_policy:
            return
        policy = self.policy(skip.policy_name, skip.mode)
        if skip.compute_budget is not None and skip.compute_budget < policy.lowest_budget - BUDGET_SLACK:
            raise InvalidRequest(
                "skip.compute_budget",
                f"{skip.compute_budget:g} is below {policy.lowest_budget:.3f}, "
                f"the lowest that policy {policy.name!r} can keep",
            )

    def policy(self, name: str | None, mode: Mode = Mode.ADAPTIVE) -> "PolicyFacts":
        """Returns the policy called `name`, or the mode's default if None.

        Raises:
            InvalidRequest: no policy has that name.
        """
        return find_policy(self.policies, name, mode)


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """Facts about a policy that callers may see."""

    name: str
    note: str
    learned: bool
    lookahead: int
    pinned_layers: tuple[int, ...]
    action_costs: dict[Action, float]
    """Cost of each action as a share of one full layer."""
    lowest_budget: float
    recommended_budget: float
    """The budget of requests that set none."""
    compensation: str
    is_drafter: bool = False
    """True if it was trained to draft for mode EXACT. It is that mode's default then, and no other mode's."""

    def default_budget(self, mode: Mode, configured: float | None) -> float:
        """Returns the budget of a request that sets none. `configured` is the server's own default for ADAPTIVE."""
        default = configured if mode is Mode.ADAPTIVE and configured is not None else self.recommended_budget
        return max(default, self.lowest_budget)


def find_policy(policies: Sequence[PolicyFacts], name: str | None, mode: Mode = Mode.ADAPTIVE) -> PolicyFacts:
    """Returns the policy called `name`, or the mode's default: the first that was trained for it, else the first.

    Raises:
        InvalidRequest: no policy has that name.
    """
    if name is None:
        suited = (policy for policy in policies if policy.is_drafter == (mode is Mode.EXACT))
        return next(suited, policies[0])
    for policy in policies:
        if policy.name == name:
            return policy
    known = ", ".join(policy.name for policy in policies)
    raise InvalidRequest("skip.policy_name", f"no policy is called {name!r}; known: {known}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and choices of one engine.

    `cache_tokens` is shared by all sequences. `context_length` bounds each of them (None: the model's own limit).
    `prefill_chunk_tokens` bounds a step's prompt tokens. `prefix_cache_tokens` bounds the prompt tokens that are kept
    for later prompts (0: none), in addition to `cache_tokens`.

    Raises:
        ConfigError: a value is out of range; it is named.
    """

    num_slots: int = 16
    cache_tokens: int = 8192
    context_length: int | None = None
    prefill_chunk_tokens: int = 512
    prefix_cache_tokens: int = 4096
    default_compute_budget: float | None = None
    """None: the policy's recommended budget."""
    lane: LaneKind | None = None
    """None: the device's default."""
    group_planner: bool = True
    """True if rows of a batch may agree on an action and a head. If False, no request's tokens depend on others."""
    prompt_lookup: bool = True
    """True if passes of a plan may run what likely follows beside a token, because the text had its last tokens
    before. It takes the group planner, and code that runs more rows in little more time."""
    rounds_prompts: bool = True
    """True if prompts of those who are not at full depth may run in INT8, where that is faster."""
    record_steps: int = 0
    """Number of decode steps, from the first of each request, whose decisions and times are recorded."""
    burst_milliseconds: float = MOST_BURST_MILLISECONDS
    """Milliseconds that a greedy request which decodes alone may keep its tokens for; 0: each leaves at once."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "cache_tokens", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("prefix_cache_tokens", "record_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(name, f"must be 0 (off) or more, got {getattr(self, name)}")
        if not 0 <= self.burst_milliseconds <= MOST_BURST_MILLISECONDS:
            raise ConfigError(
                "burst_milliseconds", f"must be 0 to {MOST_BURST_MILLISECONDS}, got {self.burst_milliseconds}"
            )
        if self.context_length is not None and self.context_length < 2:
            raise ConfigError("context_length", f"must be at least 2, got {self.context_length}")
        if self.default_compute_budget is not None and not 0 < self.default_compute_budget <= 1:
            raise ConfigError("default_compute_budget", f"must be in (0, 1], got {self.default_compute_budget}")
