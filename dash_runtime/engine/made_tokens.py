"""The tokens that passes make for a sequence to put out, each counted and recorded as it is made.

Every method that makes tokens is a generator: who puts them out may stop at one that is the last. Knows sequences and
results of passes; knows no slots and no events.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Several
from typing import NamedTuple

import torch
from torch import Tensor

from dash_runtime.decision_trace import StepKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.decider import Decider
from dash_runtime.engine.sampling import Sampler, choose_tokens
from dash_runtime.engine.sequence import Sequence
from dash_runtime.engine.step_times import StepClock
from dash_runtime.layers.batch import PassKind
from dash_runtime.passes import PassPlan, PassResult

_SCORED_ROWS = 64
"""Rows of a given output whose logits are in memory at once."""


class Made(NamedTuple):
    """A token to put out, the actions that made it, and its row of logits `[rows, vocab_size]`; without them nobody may
    want logarithms."""

    token_id: int
    plan: bytes
    logits: Tensor | None
    row: int


class MadeTokens:
    """Makes the tokens of one engine's sequences.

    Args:
        step_clock: is told of each plain token.
    """

    def __init__(self, decoder: Decoder, step_clock: StepClock | None) -> None:
        self._decoder = decoder
        self._step_clock = step_clock

    def choose(self, samplers: Mapping[int, Sampler], plan: PassPlan, result: PassResult) -> Mapping[int, int]:
        """Returns the token of each of these rows of a pass."""

        def late_logits(rows: Several[int]) -> Tensor:
            assert result.states is not None
            return self._decoder.logits(result.states[rows], [plan.heads[row] for row in rows])

        return choose_tokens(samplers, result.token_ids, result.logits, late_logits, self._decoder.draw)

    def prefilled(
        self, ended: Several[tuple[Sequence, Tensor]], on_progress: Callable[[], None]
    ) -> Iterator[tuple[Sequence, Iterator[Made]]]:
        """Makes the tokens that follow these rows of a prompt pass: each sequence's first, or more of a given
        output."""
        firsts = [own for own in ended if not own[0].is_scored_at_once]
        if firsts:
            rows = torch.cat([hidden for _, hidden in firsts])
            logits = self._decoder.logits(rows, (self._decoder.finest_head,) * len(rows))
            for row, (sequence, _) in enumerate(firsts):
                yield sequence, self._first(sequence, logits, row)
        for sequence, hidden in ended:
            if sequence.is_scored_at_once:
                yield sequence, self._scored(sequence, hidden, on_progress)

    def _first(self, sequence: Sequence, logits: Tensor, row: int) -> Iterator[Made]:
        token_id = sequence.sampler.sample(logits[row])
        plan = sequence.log.append_prefill_token(sequence.prefill_action)
        sequence.recorder.add_first_token(token_id)
        yield Made(token_id, plan, logits, row)

    def _scored(self, sequence: Sequence, hidden: Tensor, on_progress: Callable[[], None]) -> Iterator[Made]:
        for rows in hidden.split(_SCORED_ROWS):
            on_progress()
            logits = self._decoder.logits(rows, (self._decoder.finest_head,) * len(rows), PassKind.PREFILL)
            for row in range(len(rows)):
                if not sequence.output_ids:
                    yield from self._first(sequence, logits, row)
                    continue
                token_id = sequence.sampler.sample(logits[row])
                sequence.log.add_verification(1, 1.0)
                yield Made(token_id, sequence.log.append_counted_token(), logits, row)

    def decoded(
        self,
        sequence: Sequence,
        by: Decider,
        result: PassResult,
        tokens: Iterable[tuple[int, int, int]],
        exposed_ns: int,
    ) -> Iterator[Made]:
        """Makes decoded tokens: each one's place in the result, its id, and the rows of its pass, 0 if it is not the
        pass's first."""
        head, num_evaluations = by.policy.head, by.num_evaluations
        for place, token_id, num_rows in tokens:
            plan, cost = result.plans[place], 0.0
            if num_rows == 1:
                sequence.log.append_decode_token(plan, head, num_evaluations, exposed_ns)
                if self._step_clock is not None:
                    num_positions = len(sequence.request.prompt_token_ids) + len(sequence.output_ids)
                    self._step_clock.ran(by.policy.name, plan, head, num_evaluations, num_positions)
                if sequence.recorder.has_room:
                    cost = sequence.log.cost_of(plan, head, num_evaluations)
            else:
                cost = sequence.count_rows(plan, head, num_rows) if num_rows else 0.0
                sequence.count_token_of_rows(plan, num_rows == 0)
            sequence.recorder.add_pass(StepKind.DECODE, token_id, cost, result, place, by)
            yield Made(token_id, plan, result.logits, place)

    def of_guesses(
        self, sequence: Sequence, guesses: list[int], plan: PassPlan, result: PassResult, first: int
    ) -> Iterator[tuple[int, int, int]]:
        """Chooses the tokens of a pass that ran these guesses beside the last token, as far as they were right. Keys
        and values of wrong ones are dropped."""
        for place in range(1 + len(guesses)):
            token_id = self.choose({first + place: sequence.sampler}, plan, result)[first + place]
            yield first + place, token_id, 0 if place else 1 + len(guesses)
            if guesses[place : place + 1] != [token_id]:
                break
        sequence.keep_guesses(len(guesses), place)

    def verified(
        self, sequence: Sequence, result: PassResult, rows: range, started_ns: int, elapsed_ns: int
    ) -> Iterator[Made]:
        """Makes the tokens that full depth accepts of a draft, and one more, by a pass that took so long."""
        logits = None if result.logits is None else result.logits[rows.start : rows.stop]
        ids, accepted, from_text, cost = sequence.verify(logits, result.token_ids[rows.start : rows.stop])
        assert sequence.speculation is not None
        sequence.speculation.verification_ns += elapsed_ns
        sequence.recorder.add_verification(ids, accepted, from_text, cost, started_ns)
        for row, token_id in enumerate(ids):  # rejected tokens have logits, but no id
            yield Made(token_id, sequence.log.append_counted_token(), logits, row)
