"""One request on its way through the engine. Knows its own tokens and times; knows no other sequence."""

import time
from dataclasses import dataclass
from enum import StrEnum

from dash_runtime.config import GenerationRequest
from dash_runtime.decoder.kv_cache import SequenceCache
from dash_runtime.engine.decision_log import DecisionLog
from dash_runtime.engine.sampling import Sampler, TokenLogprobs
from dash_runtime.policy.catalog import Assignment
from dash_runtime.policy.policy import Token


class EndReason(StrEnum):
    """Why a sequence ended."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SlotGranted:
    """The request has its slot."""

    request_id: str
    policy: str
    compute_budget: float | None
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class TokenProduced:
    """One more token; `plan` has one byte per layer, where it was asked for."""

    request_id: str
    token_id: int
    plan: bytes
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class SequenceFinished:
    """The request is over and its slot is free."""

    request_id: str
    reason: EndReason
    num_output_tokens: int
    prefill_seconds: float
    decode_seconds: float
    log: DecisionLog


EngineEvent = SlotGranted | TokenProduced | SequenceFinished


class Sequence:
    """A request with its slot: prompt, cache, output so far."""

    def __init__(
        self,
        request: GenerationRequest,
        assignment: Assignment,
        cache: SequenceCache,
        num_layers: int,
        waiting_since: float,
    ) -> None:
        self.request = request
        self.assignment = assignment
        self.cache = cache
        self.sampler = Sampler(request.sampling, request.prompt_token_ids)
        self.output_ids: list[int] = []
        self.log = DecisionLog(num_layers, request.stopping.max_new_tokens, assignment.costs)
        self.granted_at = time.monotonic()
        self.queue_seconds = self.granted_at - waiting_since
        self._first_token_at = self.granted_at

    @property
    def num_prompt_tokens_left(self) -> int:
        """Prompt tokens that are not in the cache yet. 0 while decoding."""
        return max(0, len(self.request.prompt_token_ids) - self.cache.length)

    def next_prompt_chunk(self, max_tokens: int) -> list[int]:
        """The next prompt tokens to prefill."""
        start = self.cache.length
        return self.request.prompt_token_ids[start : start + max_tokens]

    def next_token(self) -> Token:
        """What policies know of the token that is decoded next."""
        return Token(self.request.sampling.seed, self.cache.length, self.assignment.price)

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> EndReason | None:
        """Takes the next output token; returns the reason if it is the last."""
        if not self.output_ids:
            self._first_token_at = time.monotonic()
        self.output_ids.append(token_id)
        stopping = self.request.stopping
        if token_id in stopping.stop_token_ids:
            return EndReason.STOP_TOKEN
        if token_id in eos_token_ids and not stopping.ignore_eos:
            return EndReason.END_OF_SEQUENCE
        return EndReason.LENGTH if len(self.output_ids) >= stopping.max_new_tokens else None

    def finished(self, reason: EndReason) -> SequenceFinished:
        """The closing event. Seconds are from the slot to the first token, and from there to now."""
        return SequenceFinished(
            self.request.request_id,
            reason,
            len(self.output_ids),
            self._first_token_at - self.granted_at,
            time.monotonic() - self._first_token_at,
            self.log,
        )
