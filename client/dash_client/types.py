"""The results of the client, and the names in them: plain frozen dataclasses and enums.

Knows nothing of gRPC or protobuf, so that neither appears in a user's code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, overload

from dash_client.constraint import Constraint, parse_output
from dash_client.tools import ToolCall

if TYPE_CHECKING:
    import numpy


class Action(IntEnum):
    """An action for one layer and one token, listed by ascending work. The numbers are `dash_api.v1.Action`'s."""

    SKIP = 1
    INT3 = 5
    INT4 = 2
    INT8 = 3
    FULL = 4


class Mode(StrEnum):
    """The ways to choose the actions of a request."""

    FULL_DEPTH = "full_depth"
    ADAPTIVE = "adaptive"
    EXACT = "exact"
    FIXED = "fixed"


class Priority(StrEnum):
    """The class of a request in the server's queue. Within a class, callers take turns."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class FinishReason(StrEnum):
    """The reason why a generation ended."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    UNKNOWN = "unknown"
    """A reason that this client does not know."""


class HealthStatus(StrEnum):
    """The state that a server reports."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"


class ChatMessage(TypedDict):
    """One message of a conversation; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str
    tool_calls: NotRequired[Sequence[ToolCall]]
    """The calls that the assistant made."""
    tool_call_id: NotRequired[str]
    """The id of the call that a tool answers."""
    name: NotRequired[str]
    """The name of the tool that answers."""


@dataclass(frozen=True, slots=True, repr=False)
class Decisions(Sequence[tuple[Action, ...]]):
    """The action of every layer for every token; `decisions[token][layer]` is an `Action`.

    `data` holds one byte per layer and token, token after token; each is an Action's number.
    """

    data: bytes
    layer_count: int

    def __post_init__(self) -> None:
        if self.layer_count < 1 or len(self.data) % self.layer_count:
            raise ValueError(f"{len(self.data)} actions do not make rows of {self.layer_count} layers")

    def __repr__(self) -> str:
        return f"Decisions(shape={self.shape})"

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, layers)."""
        return len(self), self.layer_count

    def __len__(self) -> int:
        return len(self.data) // self.layer_count

    @overload
    def __getitem__(self, token: int) -> tuple[Action, ...]: ...
    @overload
    def __getitem__(self, token: slice) -> "Decisions": ...
    def __getitem__(self, token: int | slice) -> "tuple[Action, ...] | Decisions":
        if isinstance(token, slice):
            rows = (self._row(index) for index in range(*token.indices(len(self))))
            return Decisions(b"".join(rows), self.layer_count)
        index = token + len(self) if token < 0 else token
        if not 0 <= index < len(self):
            raise IndexError(f"token {token} of {len(self)}")
        return tuple(Action(number) for number in self._row(index))

    def _row(self, token: int) -> bytes:
        return self.data[token * self.layer_count : (token + 1) * self.layer_count]

    def layers_run(self, token: int) -> int:
        """Returns the number of layers that ran for this token, in any precision."""
        return sum(action is not Action.SKIP for action in self[token])

    def to_numpy(self) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
        """Returns the actions' numbers as a read-only uint8 array of shape (tokens, layers).

        Raises:
            ImportError: numpy is not installed; the client does not depend on it.
        """
        import numpy

        return numpy.frombuffer(self.data, dtype=numpy.uint8).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, in nats, of the path that ran."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability) of the most probable tokens, best first."""


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """The facts that are known once a request has its slot."""

    request_id: str
    prompt_token_count: int
    seed: int
    model: str
    mode: Mode
    policy: str
    policy_note: str
    """A note on the policy for callers, such as that it is not a learned one. May be empty."""
    compute_budget: float | None
    layer_count: int
    prefill_action: Action | None
    """The action in which all layers run the prompt, and so make the first token; None: the server does not say."""


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """A piece of output: the text that these tokens complete.

    The text may be empty while a character is incomplete. It may include text of earlier tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    decisions: Decisions | None
    logprobs: tuple[TokenLogprobs, ...] | None
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls of tools that these tokens complete."""
    answer_index: int = 0
    """The number of the answer that it is a piece of, from 0 on, if several were asked for."""


@dataclass(frozen=True, slots=True)
class SpeculationUsage:
    """Counts and times of drafting and verifying in mode "exact". In other modes those of guesses: tokens of the text,
    or forced by a constraint, that passes ran beside the last token (prompt lookup). They take no time of their own."""

    drafted_token_count: int
    accepted_token_count: int
    """Drafted tokens that were accepted, in mode "exact" by full depth, and that are in the output."""
    wasted_token_count: int
    """The other drafted tokens."""
    verification_count: int
    draft_seconds: float
    """Time spent on drafting, shared with other requests' tokens if there were any."""
    verification_seconds: float
    text_drafted_token_count: int = 0
    """The part of the drafted tokens that came from the text itself: what followed the last tokens there before."""
    text_accepted_token_count: int = 0
    """The part of these that was accepted."""
    accepted_length_counts: tuple[int, ...] = ()
    """For each number of accepted tokens, from 0 on, the number of drafts of which so many were accepted."""

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens divided by drafted ones. None if nothing was drafted."""
        return self.accepted_token_count / self.drafted_token_count if self.drafted_token_count else None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and times of one request."""

    prompt_token_count: int
    output_token_count: int
    queue_seconds: float
    prefill_seconds: float
    """From the slot to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    speculation: SpeculationUsage | None = None
    """In mode "exact"; in other modes if there were guesses."""
    cached_prompt_token_count: int = 0
    """Prompt tokens shared with an earlier request, so that they were not computed again."""

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed after the first token. None if there was only one."""
        if self.output_token_count < 2 or self.decode_seconds <= 0:
            return None
        return (self.output_token_count - 1) / self.decode_seconds


@dataclass(frozen=True, slots=True)
class DepthStatistics:
    """Statistics of the actions and costs of one request's decode tokens; the first token is not counted."""

    decode_token_count: int
    action_counts: Mapping[Action, int]
    """Number of layers by action, over all counted tokens: as many for each as the model has."""
    mean_cost: float | None
    """Mean cost of a token as a share of the full-depth token's, of all that ran. None if no token was counted."""
    exposed_policy_seconds: float
    """Mean time per token that the decoder waited for decisions or spent on them."""
    speculative_action_counts: Mapping[Action, int]
    """Number of layers that ran beside these: for drafts, and for guesses and drafted tokens that were rejected."""

    @property
    def mean_layers(self) -> dict[Action, float]:
        """Mean layers per token by action. Empty if no token was counted."""
        if not self.decode_token_count:
            return {}
        return {action: count / self.decode_token_count for action, count in self.action_counts.items()}

    @property
    def mean_speculative_layers(self) -> float:
        """Mean layers per token that ran for drafts and wrong guesses. 0 if no token was counted."""
        return sum(self.speculative_action_counts.values()) / max(1, self.decode_token_count)


@dataclass(frozen=True, slots=True)
class Generation:
    """A complete answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None
    """The stop string that ended the text, if one did."""
    usage: Usage
    depth: DepthStatistics
    decisions: Decisions | None
    """None without `return_decisions`."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One entry per token. None without `logprobs`."""
    started: GenerationStarted
    constraint: Constraint | None = field(default=None, repr=False)
    """As it was asked for."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls of tools, in order; they are not part of the text."""
    others: "tuple[Generation, ...]" = ()
    """The other answers, if several were asked for."""

    @property
    def message(self) -> ChatMessage:
        """The answer as the conversation's next message."""
        message = ChatMessage(role="assistant", content=self.text)
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message

    @property
    def parsed(self) -> Any:
        """The text as what the constraint says that it is: an instance of a model class, what the JSON of a schema
        stands for, or the text.

        Raises:
            ValueError: the text was cut off (pydantic's and json's errors are such).
        """
        return parse_output(self.text, self.constraint)
