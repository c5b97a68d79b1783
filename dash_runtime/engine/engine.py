"""Continuous batching: sequences take slots, are prefilled in chunks, and decode together token by token.

Knows sequences, slots and events; knows no text and no transport. It reads clocks for statistics only.
"""

import time
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch

from dash_runtime.config import EngineConfig, GenerationRequest, ModelFacts
from dash_runtime.decision_trace import StepKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.bursts import Bursts
from dash_runtime.engine.constraints import ConstraintCompiler
from dash_runtime.engine.decider import Decider
from dash_runtime.engine.decoding_rows import RecentRows, next_guesses, pass_seconds
from dash_runtime.engine.device_times import settle_decisions
from dash_runtime.engine.draft_rounds import DraftRounds
from dash_runtime.engine.graph_work import GraphWork
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.later import LaterWork
from dash_runtime.engine.made_tokens import Made, MadeTokens
from dash_runtime.engine.prompt_passes import PromptPasses
from dash_runtime.engine.sequence import Sequence
from dash_runtime.engine.step_times import CostWatch, StepClock
from dash_runtime.engine.waiting_line import WaitingLine
from dash_runtime.events import EndReason, EngineEvent, RequestRefused
from dash_runtime.layers.batch import PassKind
from dash_runtime.passes import PassPlan, PassResult, Planner
from dash_runtime.policy.catalog import Assignment, Catalog
from dash_runtime.policy.draft_costs import RoundCosts

Events = list[EngineEvent]


class Engine:
    """Serves generation requests step by step. Not thread-safe: one caller owns it."""

    def __init__(
        self,
        decoder: Decoder,
        catalog: Catalog,
        lane: Lane,
        facts: ModelFacts,
        config: EngineConfig,
        planner: Planner | None = None,
        cost_watch: CostWatch | None = None,
        constraints: ConstraintCompiler | None = None,
        round_costs: RoundCosts | None = None,
        later: LaterWork | None = None,
    ) -> None:
        self.facts = facts
        self.cost_watch = cost_watch
        self.later = later or LaterWork()
        """What it does once it serves and is idle."""
        self._step_clock = None if cost_watch is None else StepClock(cost_watch.observe)
        self._decoder = decoder
        self._catalog = catalog
        self._lane = lane
        self._planner = planner
        self._config = config
        self._pool = decoder.pool(config.cache_tokens, config.num_slots)
        self._prompts = PromptPasses(decoder, config)
        self._waiting = WaitingLine(constraints)
        self._running: dict[str, Sequence] = {}
        self._rounds = DraftRounds(round_costs, config.group_planner)
        self._recent_rows = RecentRows(decoder, lane)
        self._made = MadeTokens(decoder, self._step_clock)
        self.bursts = Bursts(decoder, config.burst_milliseconds / 1e3)
        self.on_progress: Callable[[], None] = lambda: None
        """Called between the layers of a pass over many tokens, which may take seconds."""
        self.may_capture = True
        """True if a step captures the graphs that it lacks. Whoever waits for it would wait for that too."""

    def learn(self, planner: Planner | None = None, round_costs: RoundCosts | None = None) -> None:
        """Takes what was measured since."""
        self._planner = planner or self._planner
        if round_costs is not None:
            self._rounds = DraftRounds(round_costs, self._config.group_planner)

    @property
    def has_work(self) -> bool:
        """True if `step` would do anything."""
        return bool(self._waiting or self._running)

    @property
    def num_reserved_cache_tokens(self) -> int:
        """KV cache positions that running sequences have reserved."""
        return self._pool.reserved_tokens

    @property
    def num_kept_prompt_tokens(self) -> int:
        """Prompt tokens whose keys and values are kept for later prompts."""
        return self._prompts.num_kept_tokens

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request. It gets a slot in one of the next steps, first come, first served.

        Raises:
            InvalidRequest: the request does not fit this model. Nothing is queued. A constraint that cannot be used
                ends it later, with an event.
        """
        self.facts.validate(request)
        self._waiting.add(request)

    def cancel(self, request_id: str) -> Events:
        """Forgets a request wherever it is; unknown ids are ignored. A request that had a slot leaves a last event."""
        self._waiting.drop(request_id)
        sequence = self._running.get(request_id)
        if sequence is None:
            return []
        self._release(sequence)
        return [sequence.cancelled()]

    def stop(self, request_id: str) -> Events:
        """Ends a running request now because its output has a stop string; unknown ids are ignored."""
        sequence = self._running.get(request_id)
        return [] if sequence is None else [self._finish(sequence, EndReason.STOP_STRING)]

    def step(self) -> Events:
        """Runs one step and returns its events.

        Grants free slots, prefills one chunk of prompts, decodes or drafts one token of every sequence whose prompt is
        done, and verifies complete drafts.
        """
        graphs = self._decoder.graphs
        if graphs is not None:
            graphs.may_capture = self.may_capture
        try:
            # To enter it takes a hundredth of a token, so a caller may stay in it.
            if torch.is_inference_mode_enabled():
                return self._step()
            with torch.inference_mode():
                return self._step()
        finally:
            if graphs is not None:
                graphs.may_capture = True

    def _step(self) -> Events:
        events: Events = []
        self._grant_slots(events)
        decoding = [sequence for sequence in self._running.values() if not sequence.num_prompt_tokens_left]
        if self._step_clock is not None:
            is_plain = len(self._running) == 1 and decoding and decoding[0].is_plain
            self._step_clock.begin(decoding[0].request.request_id if is_plain else None)
        if len(decoding) < len(self._running):
            self._prefill(bool(decoding), events)
        if all(sequence.speculation is None for sequence in decoding):
            if decoding:
                self._decode(decoding, events)
            return events
        if ready := self._rounds.begin(decoding):
            self._decode(ready, events)
        for together in self._rounds.complete(decoding):
            self._verify(together, events)
        return events

    def graph_work(self) -> GraphWork:
        """Returns what captures the graphs that requests replay, while the engine is idle."""
        longest = min(self.facts.context_length, self._pool.total_tokens)
        return GraphWork(self._decoder, self._lane, self._pool, self._config.num_slots, longest)

    def close(self) -> None:
        """Stops the lane."""
        self._lane.close()

    def _grant_slots(self, events: Events) -> None:
        if not self._running:
            self._waiting.wait_a_moment()
        while refused := self._waiting.refused():
            request, error = refused
            events.append(RequestRefused(request.request_id, error.field, error.description))
        while len(self._running) < self._config.num_slots and (entry := self._waiting.next(self._pool.reserve)):
            waiting, cache = entry
            request = waiting.request
            assignment, looks_up = self._catalog.assign(request.skip), self._config.prompt_lookup
            sequence = Sequence(
                *(request, assignment, cache, self._decoder.num_layers, waiting.since),
                *(self.facts.eos_token_ids, self._config.record_steps, waiting.constraint),
                pass_seconds(assignment, self._planner) if looks_up or waiting.constraint is not None else None,
                looks_up,
            )
            self._running[request.request_id] = sequence
            events.append(sequence.granted())

    def _prefill(self, is_decoding: bool, events: Events) -> None:
        for ended in self._prompts.run(list(self._running.values()), is_decoding, self.on_progress):
            for sequence, made in self._made.prefilled(ended, self.on_progress):
                self._put_out(sequence, made, events)

    def _decode(self, sequences: list[Sequence], events: Events) -> None:
        assignments = [sequence.decider_assignment(self._catalog.full_depth) for sequence in sequences]
        if len(self._running) == 1 and not self._waiting and self._decode_burst(sequences[0], assignments[0], events):
            return
        guesses = next_guesses(sequences) if self._config.group_planner else [[]] * len(sequences)
        token_ids = [one for own, more in zip(sequences, guesses, strict=True) for one in (own.last_token_id, *more)]
        lengths = [1 + len(more) for more in guesses]
        planner = self._planner if len(sequences) > 1 else None  # a single row has none to agree with
        rows = self._recent_rows.next(sequences, assignments, lengths, planner)
        exposed_before, started_ns = self._lane.exposed_ns, time.perf_counter_ns()
        rows.batch.is_timed = any(sequence.recorder.has_room for sequence in sequences)
        result = self._decoder.run_pass(rows.plan, token_ids, rows.batch)
        rows.batch.commit()
        if rows.batch.is_timed:
            settle_decisions(result.record, [block for decider in rows.deciders for block in decider.blocks])
        exposed_ns, elapsed_ns = self._lane.exposed_ns - exposed_before, time.perf_counter_ns() - started_ns
        rows.token_seconds = elapsed_ns / 1e9
        self._prompts.pace.stepped(rows.token_seconds)
        plain = {
            row: own.sampler
            for row, own, beside in zip(rows.firsts, sequences, guesses, strict=True)
            if not (beside or own.is_drafting)
        }
        chosen = self._made.choose(plain, rows.plan, result)
        for row, sequence, assignment, beside in zip(rows.firsts, sequences, assignments, guesses, strict=True):
            decider = rows.decider_of[row]
            own_exposed_ns = 0 if assignment.is_planned else exposed_ns
            if sequence.is_drafting:
                self._draft(sequence, decider, result, row, beside, own_exposed_ns, elapsed_ns)
                continue
            if sequence.speculation is not None:
                sequence.speculation.decoded()
            tokens = self._made.of_guesses(sequence, beside, rows.plan, result, row) if beside else None
            made = self._made.decoded(sequence, decider, result, tokens or [(row, chosen[row], 1)], own_exposed_ns)
            self._put_out(sequence, made, events)

    def _decode_burst(self, sequence: Sequence, assignment: Assignment, events: Events) -> bool:
        """Decodes several tokens of a sequence that runs alone; returns False if that cannot be now."""
        if not self.bursts.may_have(sequence):
            return False
        rows = self._recent_rows.next([sequence], [assignment], [1], None)
        if (burst := self.bursts.decode(rows, sequence)) is None:
            return False
        assert rows.token_seconds is not None
        self._prompts.pace.stepped(rows.token_seconds)
        if self._step_clock is not None and burst.num_rows.count(1) < len(burst.token_ids):
            self._step_clock.begin(None)  # its tokens took different times
        tokens = zip(range(len(burst.token_ids)), burst.token_ids, burst.num_rows, strict=True)
        self._put_out(sequence, self._made.decoded(sequence, rows.deciders[0], burst, tokens, 0), events)
        return True

    def _draft(
        self,
        sequence: Sequence,
        by: Decider,
        result: PassResult,
        row: int,
        guesses: list[int],
        exposed_ns: int,
        elapsed_ns: int,
    ) -> None:
        """Adds the token of this row to the sequence's draft, and the one of the row after it if it had a right
        guess."""
        plan = result.plans[row]
        cost = sequence.log.add_draft_token(plan, by.policy.head, by.num_evaluations, exposed_ns)
        if guesses:
            assert sequence.assignment.drafting is not None
            sequence.log.add_guess(plan, added := cost * sequence.assignment.drafting.second_row)
            cost += added
        logits = None if result.logits is None else result.logits[row:]
        for place, token_id in enumerate(sequence.draft(logits, result.token_ids[row:], cost, elapsed_ns, guesses)):
            sequence.recorder.add_pass(StepKind.DRAFT, token_id, 0.0 if place else cost, result, row + place, by)

    def _verify(self, sequences: list[Sequence], events: Events) -> None:
        """Runs complete drafts at full depth in one pass and outputs the accepted tokens. The drafts' keys and values
        are dropped first, so that accepted tokens keep full depth's."""
        started_ns = time.perf_counter_ns()
        token_ids = [sequence.take_back_draft() for sequence in sequences]
        lengths = [len(ids) for ids in token_ids]
        caches = [sequence.cache for sequence in sequences]
        compensations = [sequence.assignment.policy.compensation for sequence in sequences]
        batch = self._decoder.batch(PassKind.VERIFY, caches, lengths, compensations)
        heads = (self._decoder.finest_head,) * batch.num_rows
        plan = PassPlan.of(
            (self._decoder.highest,) * self._decoder.num_layers,
            heads,
            wants_logits=any(sequence.wants_logits for sequence in sequences),
            shares_head=len(sequences) > 1,  # a sequence that runs alone does not depend on its neighbours
        )
        result = self._decoder.run_pass(plan, [token_id for own in token_ids for token_id in own], batch)
        batch.commit()
        elapsed_ns = time.perf_counter_ns() - started_ns
        for sequence, length, end in zip(sequences, lengths, accumulate(lengths), strict=True):
            made = self._made.verified(sequence, result, range(end - length, end), started_ns, elapsed_ns)
            self._put_out(sequence, made, events)

    def _put_out(self, sequence: Sequence, tokens: Iterable[Made], events: Events) -> None:
        """Puts out tokens as they are made, until one is the last."""
        for token_id, plan, logits, row in tokens:
            if refusal := sequence.refusal():
                events.append(refusal)
                self._release(sequence)
                return
            events.append(sequence.produced(token_id, plan, logits, row))
            if reason := sequence.append(token_id):
                events.append(self._finish(sequence, reason))
                return

    def _finish(self, sequence: Sequence, reason: EndReason) -> EngineEvent:
        self._release(sequence)
        return sequence.finished(reason)

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.request.request_id]
        self._prompts.drop(sequence)
        self._pool.release(sequence.cache)
