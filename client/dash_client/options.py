"""The arguments of the client. Knows nothing of gRPC or protobuf."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from dash_client.constraint import Constraint
from dash_client.tools import AnyTool
from dash_client.types import Action, ChatMessage, Mode, Priority

Prompt = str | Sequence[int] | Sequence[ChatMessage] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or a conversation for the model's chat template."""


Messages = str | Sequence[ChatMessage] | Sequence[Mapping[str, Any]]
"""A conversation, oldest message first; a string is one user message."""


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of `generate`, `stream`, `chat`, `chat_stream` and `map`.

    An option that is left out or None is not sent, and the server's default holds; 0 and False are sent.
    A value of the wrong type or out of range raises `InvalidArgumentError` before anything is sent.
    """

    temperature: float | None
    """Divides the logits, in [0, 100]; 0 is greedy, and the server's default."""
    top_k: int | None
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float | None
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    min_p: float | None
    """Keep tokens with at least this share of the highest probability, in [0, 1]."""
    repetition_penalty: float | None
    """Divides positive and multiplies negative logits of tokens seen so far, in [0.01, 100]."""
    presence_penalty: float | None
    """Subtracted from the logits of tokens already in the output, in [-100, 100]."""
    frequency_penalty: float | None
    """Subtracted once per occurrence in the output, in [-100, 100]."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of these token ids, each in [-100, 100]."""
    seed: int | None
    """Seed of this request's own generator, 64 bits; drawn by the server if left out. It repeats a text in the same
    mode only: "exact" and "full_depth" draw different texts from the same distribution."""
    max_new_tokens: int | None
    """The maximum number of tokens to generate, at least 1."""
    stop: str | Sequence[str] | None
    """Stop before the first of these strings; the text does not contain it."""
    stop_token_ids: Sequence[int] | None
    """Stop at the first of these token ids; the text does not contain it."""
    ignore_eos: bool | None
    """Continue past the model's own end-of-sequence tokens."""
    constraint: Constraint | None
    """A rule for the text, which keeps it unless it was cut off: see its `finish_reason`."""
    n: int | None
    """The number of answers to the prompt, which is computed once. They are drawn apart; see `Generation.others`."""
    priority: Priority | str | None
    """The class in the server's queue: "low" (waits until no other class waits), "normal" or "high"."""
    tools: Sequence[AnyTool] | None
    """For a conversation: the tools that the reply may call. See its `tool_calls`."""
    tool_choice: str | None
    """"auto" (text, calls or both), "none", "required" (calls alone), or the name of the tool that is called."""
    parallel_tool_calls: bool | None
    """Permission to call several tools; False: the reply ends with its first call."""
    mode: Mode | str | None
    """The way to choose actions: "adaptive", "full_depth", "fixed" or "exact"."""
    compute_budget: float | None
    """Upper bound on the mean decode cost, as a share of the full-depth token's, in (0, 1]. In mode "exact" it applies
    to drafted tokens."""
    policy_name: str | None
    """The policy that decides."""
    fixed_action: Action | str | None
    """In mode "fixed": the action of all layers ("skip", "int3", "int4", "int8", "full"). "skip" leaves the edges in
    full."""
    draft_length: int | None
    """In mode "exact": the maximum number of tokens per draft, at least 1; drafts get shorter when few are accepted."""
    logprobs: int | None
    """Return the log probability of each token, and of this many most probable tokens, in [0, 20]."""
    return_decisions: bool | None
    """Return the action of every layer for every token."""
    trace: bool | None
    """Trace this request's decisions, whatever the server's sampling ratio."""
    immediate: bool | None
    """In a stream: send each token as soon as it is made. Else a server may send several together: with many streams up
    to 25 ms after the first of them, with one up to 10."""
