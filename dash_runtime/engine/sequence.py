"""One request on its way through the engine. Knows its own tokens and times; knows no other sequence."""

import time

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, Mode
from dash_runtime.engine.constraints import TextConstraint
from dash_runtime.engine.decision_log import DecisionLog
from dash_runtime.engine.guesses import Guesses, PassSeconds
from dash_runtime.engine.sampling import GivenTokens, Sampler, token_logprobs
from dash_runtime.engine.speculative import Speculation, WantedDraft
from dash_runtime.engine.text_drafts import TextDrafts
from dash_runtime.engine.trace_recorder import TraceRecorder
from dash_runtime.events import (
    EndReason,
    RequestRefused,
    SequenceCancelled,
    SequenceFinished,
    SlotGranted,
    TokenProduced,
)
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.policy.catalog import Assignment
from dash_runtime.policy.draft_length import DraftCosts, DraftLength
from dash_runtime.policy.policy import Token


class Sequence:
    """A request in its slot: prompt, KV cache, output so far."""

    def __init__(
        self,
        request: GenerationRequest,
        assignment: Assignment,
        cache: SequenceCache,
        num_layers: int,
        waiting_since: float,
        eos_token_ids: frozenset[int],
        record_steps: int = 0,
        constraint: TextConstraint | None = None,
        pass_seconds: PassSeconds | None = None,
        looks_up: bool = False,
    ) -> None:
        """With `pass_seconds` its passes may have guesses, unless it drafts: what the constraint forces and, if it
        `looks_up`, what its text had before."""
        self.end_token_ids = request.stopping.end_token_ids(eos_token_ids)
        """The tokens that no other may follow."""
        self.request = request
        self.assignment = assignment
        self.cache = cache
        self._constraint = constraint
        scored = request.scored_token_ids
        self.is_scored_at_once = scored is not None and request.skip.mode is Mode.FULL_DEPTH
        """True if passes over many tokens, as a prompt's are, give the log probabilities of a given output."""
        self._prefilled_ids = request.prompt_token_ids
        if scored is not None and self.is_scored_at_once:
            self._prefilled_ids = [*request.prompt_token_ids, *scored[:-1]]
        processors = () if constraint is None else (constraint,)
        self.sampler = (
            GivenTokens(scored)
            if scored is not None
            else Sampler(request.sampling, request.prompt_token_ids, processors)
        )
        self.output_ids: list[int] = []
        self.num_cached_prompt_tokens = 0
        drafting = assignment.drafting
        self.log = DecisionLog(num_layers, request.stopping.max_new_tokens, assignment.costs)
        self.speculation: Speculation | None = None
        if drafting is not None:
            costs = drafting.draft_cost, drafting.verification_costs
            lengths = DraftLength(*costs, drafting.least_gain, drafting.second_row)
            room = request.stopping.max_new_tokens + lengths.longest
            text = TextDrafts(request.prompt_token_ids, room)
            self.speculation = Speculation(self.sampler, lengths, text, constraint)
        self.guesses: Guesses | None = None
        if pass_seconds is not None and drafting is None and scored is None:
            prompt = request.prompt_token_ids if looks_up else None
            self.guesses = Guesses(pass_seconds, constraint, prompt, request.stopping.max_new_tokens)
        self.recorder = TraceRecorder(assignment, record_steps)
        self.granted_at = time.monotonic()
        self.queue_seconds = self.granted_at - waiting_since
        self._first_token_at = self.granted_at

    def granted(self) -> SlotGranted:
        """Returns its first event."""
        own, policy = self.assignment, self.assignment.policy.name
        facts = own.compute_budget, self.queue_seconds, own.note, own.divergence, self.prefill_action
        return SlotGranted(self.request.request_id, policy, *facts)

    @property
    def prefill_action(self) -> Action:
        """The action of its prompt's tokens in all layers."""
        return self.assignment.prefill_action or self.assignment.costs.highest

    @property
    def num_prompt_tokens_left(self) -> int:
        """Prompt tokens that are not in the KV cache yet; 0 while decoding."""
        return max(0, len(self._prefilled_ids) - self.cache.length)

    def next_prompt_chunk(self, max_tokens: int) -> list[int]:
        """Returns the next prompt tokens to prefill."""
        start = self.cache.length
        return self._prefilled_ids[start : start + max_tokens]

    @property
    def num_rows_to_put_out(self) -> int:
        """Rows of the last prompt pass that the output's tokens follow: the prompt's last, and those of a given output
        that is scored at once."""
        return max(0, self.cache.length + 1 - len(self.request.prompt_token_ids) - len(self.output_ids))

    @property
    def is_plain(self) -> bool:
        """True if a step does no more than decode a token: neither drafts, nor samples, nor takes logarithms."""
        return self.speculation is None and self.sampler.is_plain_greedy and self.request.logprobs is None

    @property
    def may_burst(self) -> bool:
        """True if its next tokens may come together: nobody looks at one before the next, or wants it at once."""
        wants_each = self.request.is_immediate or self.request.logprobs is not None
        return self.speculation is None and not wants_each

    @property
    def is_drafting(self) -> bool:
        """True if the next decode step drafts."""
        return self.speculation is not None and self.speculation.is_drafting

    @property
    def last_token_id(self) -> int:
        """The input of the next decode step."""
        drafted = self.speculation.token_ids if self.speculation is not None else []
        return drafted[-1] if drafted else self.output_ids[-1]

    @property
    def num_tokens_left(self) -> int:
        """Output tokens that the limit still allows."""
        return self.request.stopping.max_new_tokens - len(self.output_ids)

    @property
    def has_draft(self) -> bool:
        """True if a draft is under way or complete."""
        return self.speculation is not None and bool(self.speculation.token_ids or self.speculation.is_drafting)

    def wanted_draft(self, costs: DraftCosts | None) -> WantedDraft:
        """Returns the draft that would gain most at these costs."""
        assert self.speculation is not None
        return self.speculation.wanted(self.num_tokens_left, costs)

    def begin_draft(self, costs: DraftCosts | None, passes: int | None) -> None:
        """Chooses the next draft, in so many passes that other sequences share; None: as if this one were alone."""
        assert self.speculation is not None
        self.speculation.begin(self.num_tokens_left, costs, passes)

    def guess_beside_draft(self) -> list[int]:
        """Returns the token after the next draft's first row if it is worth running beside it.

        Only for a plan that is the same for every token: a policy would have to know the token first.
        """
        drafts = self.speculation
        guess = drafts.guess() if drafts is not None and self.assignment.is_planned else None
        return [] if guess is None else [guess]

    def draft(
        self, logits: Tensor | None, likeliest: list[int], cost: float, elapsed_ns: int, guesses: list[int]
    ) -> list[int]:
        """Adds and returns the next drafted token; and the one after it, if the pass ran the right guess too.

        `logits` begin with the drafting path's, `[1 or 2, vocab_size]`, if they are wanted, and `likeliest` with each
        row's token of the largest. Keys and values of a wrong guess are dropped.
        """
        speculation = self.speculation
        assert speculation is not None
        speculation.draft_ns += elapsed_ns
        rows = [None, None] if logits is None else logits[:2]
        drafted = [speculation.draft(rows[0], cost, likeliest[0])]
        if guesses:
            if drafted == guesses and not self._ends_with_draft(guesses[0]):
                drafted.append(speculation.draft(rows[1], 0.0, likeliest[1]))
            else:
                self.cache.truncate(self.cache.length - 1)
        if self._ends_with_draft(drafted[-1]):
            speculation.end_draft()
        else:
            speculation.go_on()
        return drafted

    def _ends_with_draft(self, token_id: int) -> bool:
        """Returns True if this token, the draft's last one, would be the output's last."""
        assert self.speculation is not None
        return self._end_with(token_id, len(self.output_ids) + len(self.speculation.token_ids)) is not None

    def count_rows(self, plan: bytes, head: Action, num_rows: int) -> float:
        """Counts a pass with guesses, all rows of which ran this plan; returns its cost."""
        assert self.guesses is not None
        self.guesses.ran(num_rows - 1)
        return self.log.add_rows(plan, head, num_rows, self.guesses.cost(num_rows - 1))

    def count_token_of_rows(self, plan: bytes, is_guessed: bool) -> bytes:
        """Counts a token of such a pass, whether it was guessed or not; returns its decisions."""
        assert self.guesses is not None
        if is_guessed:
            self.guesses.was_right()
        return self.log.append_counted_token(plan)

    def keep_guesses(self, num_guesses: int, num_right: int) -> None:
        """Counts the guesses of a pass, and drops the keys and values of wrong ones."""
        assert self.guesses is not None
        self.guesses.checked(num_guesses, num_right)
        self.cache.truncate(self.cache.length - (num_guesses - num_right))

    @property
    def num_rows_to_verify(self) -> int:
        """Rows of a pass that verifies the draft: its tokens, and the one before."""
        assert self.speculation is not None
        return 1 + len(self.speculation.token_ids)

    def take_back_draft(self) -> list[int]:
        """Drops the draft's keys and values; returns the tokens to verify: the last output token, then the draft."""
        assert self.speculation is not None
        self.cache.truncate(self._num_settled_positions)
        return [self.output_ids[-1], *self.speculation.token_ids]

    def verify(self, logits: Tensor | None, likeliest: list[int]) -> tuple[list[int], int, int, float]:
        """Ends the draft by full depth's likeliest tokens, one by verified token, and its logits `[verified tokens,
        vocab_size]`, if they are wanted.

        Returns the next output tokens, how many of them were drafted, how many of the draft's came from the text, and
        the cost in full-depth tokens.
        Keys and values of rejected tokens are dropped.
        """
        assert self.speculation is not None
        assert self.assignment.drafting is not None
        count = len(likeliest)
        cost = self.assignment.drafting.verification_costs[count - 1] if count > 1 else 1.0
        self.log.add_verification(count, cost)
        num_from_text = self.speculation.num_from_text
        token_ids = self.speculation.verify(logits, likeliest)
        num_accepted = len(token_ids) - 1
        places = enumerate(token_ids, start=1)
        ends = (place for place, token_id in places if self._end_with(token_id, len(self.output_ids) + place))
        token_ids = token_ids[: 1 if self.refusal() else next(ends, None)]
        self.cache.truncate(self._num_settled_positions + len(token_ids))
        return token_ids, min(num_accepted, len(token_ids)), num_from_text, cost

    @property
    def _num_settled_positions(self) -> int:
        """Positions before the last output token."""
        return len(self.request.prompt_token_ids) + len(self.output_ids) - 1

    @property
    def wants_logits(self) -> bool:
        """False if the likeliest token is all that its steps need: always if it drafts, nearly always otherwise."""
        needs_none = self.sampler.mostly_takes_likeliest if self.speculation is None else self.sampler.is_plain_greedy
        return not needs_none or self.request.logprobs is not None

    def decider_assignment(self, full_depth: Assignment) -> Assignment:
        """Returns what decides in the next decode step: `full_depth` for an EXACT sequence that does not draft."""
        return self.assignment if self.speculation is None or self.is_drafting else full_depth

    def next_token(self) -> Token:
        """Returns what policies may know about the token that is decoded next."""
        return Token(self.request.sampling.seed, self.cache.length, self.assignment.price)

    def produced(self, token_id: int, plan: bytes, logits: Tensor | None, row: int) -> TokenProduced:
        """Returns the event of a token that was chosen from this row of logits `[rows, vocab_size]`, which it needs if
        its logarithm is asked for."""
        request, logprobs = self.request, None
        if request.logprobs is not None:
            assert logits is not None
            logprobs = token_logprobs(logits[row], token_id, request.logprobs)
        return TokenProduced(request.request_id, token_id, plan if request.return_decisions else b"", logprobs)

    def append(self, token_id: int) -> EndReason | None:
        """Adds an output token; returns the reason if it is the last."""
        if not self.output_ids:
            self._first_token_at = time.monotonic()
        self.output_ids.append(token_id)
        if self.speculation is not None:
            self.speculation.append(token_id)
        reason = self._end_with(token_id, len(self.output_ids))
        return reason or (None if self.num_tokens_left else EndReason.LENGTH)

    def _end_with(self, token_id: int, place: int) -> EndReason | None:
        """Returns the reason if no token may follow this one, the output's `place`-th, whatever the limit."""
        if token_id in self.end_token_ids:
            is_stop = token_id in self.request.stopping.stop_token_ids
            return EndReason.STOP_TOKEN if is_stop else EndReason.END_OF_SEQUENCE
        if self._constraint is not None and self._constraint.is_complete_after(place):
            return EndReason.END_OF_SEQUENCE
        return None

    def refusal(self) -> RequestRefused | None:
        """Returns the last event of a sequence whose constraint cannot go on: its next token is worth nothing."""
        failure = None if self._constraint is None else self._constraint.failure
        if failure is None:
            return None
        return RequestRefused(self.request.request_id, failure.field, failure.description)

    def finished(self, reason: EndReason) -> SequenceFinished:
        """Returns the closing event."""
        drafts = self.speculation or self.guesses
        return SequenceFinished(
            self.request.request_id,
            reason,
            len(self.output_ids),
            self._first_token_at - self.granted_at,
            time.monotonic() - self._first_token_at,
            self.log.statistics(),
            None if drafts is None else drafts.statistics(),
            self.num_cached_prompt_tokens,
            self.recorder.packed(self.request.request_id),
        )

    def cancelled(self) -> SequenceCancelled:
        """Returns the last event of a sequence that was cancelled."""
        return SequenceCancelled(self.request.request_id, self.recorder.packed(self.request.request_id))
