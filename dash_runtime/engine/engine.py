"""Continuous batching: sequences take slots, are prefilled in chunks, and decode together token by token.

Knows sequences, slots and events; knows no text and no transport. It reads clocks for statistics only.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from itertools import accumulate

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig, GenerationRequest, ModelFacts
from dash_runtime.decision_trace import StepKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices.step_timer import CudaStepTimer
from dash_runtime.engine.bursts import Bursts
from dash_runtime.engine.constraints import ConstraintCompiler
from dash_runtime.engine.deciders import RecentRows, next_guesses, pass_seconds
from dash_runtime.engine.device_times import settle_decisions
from dash_runtime.engine.draft_rounds import DraftRounds
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.planner import Planner
from dash_runtime.engine.prompt_passes import PromptPasses, full_depth_batch
from dash_runtime.engine.sampling import choose_tokens
from dash_runtime.engine.sequence import Sequence
from dash_runtime.engine.step import Decider, StepOutput, decode_step
from dash_runtime.engine.step_times import CostWatch, StepClock
from dash_runtime.engine.waiting_line import WaitingLine
from dash_runtime.events import EndReason, EngineEvent
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.kv_cache import CachePool
from dash_runtime.policy.catalog import Assignment, Catalog
from dash_runtime.policy.draft_costs import RoundCosts
from dash_runtime.policy.policy import Policy

Events = list[EngineEvent]

_SCORED_ROWS = 64
"""Rows of a given output whose logits are in memory at once."""


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
    ) -> None:
        self.facts = facts
        self.cost_watch = cost_watch
        self._step_clock = None if cost_watch is None else StepClock(cost_watch.observe)
        self._decoder = decoder
        self._catalog = catalog
        self._lane = lane
        self._planner = planner
        self._config = config
        self._pool = CachePool(
            decoder.config, config.cache_tokens, decoder.dtype, decoder.devices, max_sequences=config.num_slots
        )
        self._prompts = PromptPasses(decoder, config)
        self._waiting = WaitingLine(constraints)
        self._running: dict[str, Sequence] = {}
        self._rounds = DraftRounds(round_costs, config.group_planner)
        self._recent_rows = RecentRows(decoder)
        self.bursts = Bursts(decoder, config.burst_milliseconds / 1e3)
        self.on_progress: Callable[[], None] = lambda: None
        """Called between the layers of a pass over many tokens, which may take seconds."""

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
            InvalidRequest: the request does not fit this model. Nothing is queued.
        """
        self.facts.validate(request)
        self._waiting.add(request)

    def cancel(self, request_id: str) -> Events:
        """Forgets a request wherever it is; unknown ids are ignored. A request that had a slot leaves a last event."""
        self._waiting.drop(request_id)
        sequence = self._running.pop(request_id, None)
        if sequence is None:
            return []
        self._pool.release(sequence.cache)
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
        if torch.is_inference_mode_enabled():  # to enter it takes a hundredth of a token, so a caller may stay in it
            return self._step()
        with torch.inference_mode():
            return self._step()

    def _step(self) -> Events:
        events: Events = []
        self._grant_slots(events)
        decoding = [sequence for sequence in self._running.values() if not sequence.num_prompt_tokens_left]
        if self._step_clock is not None:
            is_plain = len(self._running) == 1 and decoding and decoding[0].is_plain
            self._step_clock.begin(decoding[0].request.request_id if is_plain else None)
        self._prefill(events)
        if running := self._rounds.begin(decoding):
            self._decode(running, events)
        for together in self._rounds.complete(decoding):
            self._verify(together, events)
        return events

    def prepare_graphs(self, policy: Policy) -> None:
        """Captures the graphs that requests with this policy replay, however many run together.

        Raises:
            CaptureFailed: the device cannot.
        """
        own = policy.compensation, policy.kv_action
        self._decoder.prepare_graphs(self._pool, self._config.num_slots, *own)

    def close(self) -> None:
        """Stops the lane."""
        self._lane.close()

    def _grant_slots(self, events: Events) -> None:
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

    def _prefill(self, events: Events) -> None:
        for sequence, hidden in self._prompts.run(list(self._running.values()), self.on_progress):
            self._put_out(sequence, hidden, events)

    def _put_out(self, sequence: Sequence, hidden: Tensor, events: Events) -> None:
        """Puts out the tokens that follow these rows of a prompt pass: the first, or more of a given output."""
        kind = PassKind.PREFILL if sequence.is_scored_at_once else PassKind.DECODE
        for rows in hidden.split(_SCORED_ROWS) if len(hidden) else ():
            self.on_progress()
            logits = self._decoder.logits(rows, (Action.FULL,) * len(rows), kind)
            for row in range(len(rows)):
                token_id = sequence.sampler.sample(logits[row])
                if not sequence.output_ids:
                    plan = sequence.log.append_prefill_token()
                    sequence.recorder.add_first_token(token_id)
                else:
                    sequence.log.add_verification(1, 1.0)
                    plan = sequence.log.append_counted_token()
                self._take(sequence, token_id, logits, row, plan, events)

    def _decode(self, sequences: list[Sequence], events: Events) -> None:
        assignments = [sequence.decider_assignment(self._catalog.full_depth) for sequence in sequences]
        if len(self._running) == 1 and not self._waiting and self._decode_burst(sequences[0], assignments[0], events):
            return
        guesses = next_guesses(sequences) if self._config.group_planner else [[]] * len(sequences)
        token_ids = [one for own, more in zip(sequences, guesses, strict=True) for one in (own.last_token_id, *more)]
        lengths = [1 + len(more) for more in guesses]
        planner = self._planner if len(sequences) > 1 else None  # a single row has none to agree with
        rows = self._recent_rows.next(sequences, assignments, lengths, planner)
        deciders = rows.deciders
        exposed_before, started_ns = self._lane.exposed_ns, time.perf_counter_ns()
        is_recorded = any(sequence.recorder.has_room for sequence in sequences)
        own_step = self._lane, rows.batch, token_ids, deciders, planner, is_recorded, rows.plan
        output = decode_step(self._decoder, *own_step)
        likeliest_ids = output.likeliest
        if isinstance(output.timer, CudaStepTimer):
            settle_decisions(output.timer, [block for decider in deciders for block in decider.blocks])
        exposed_ns, elapsed_ns = self._lane.exposed_ns - exposed_before, time.perf_counter_ns() - started_ns
        rows.token_seconds = elapsed_ns / 1e9
        samplers = {
            row: own.sampler
            for row, own, beside in zip(rows.firsts, sequences, guesses, strict=True)
            if not (beside or own.is_drafting)
        }
        draw = self._decoder.draw
        chosen_ids = choose_tokens(samplers, likeliest_ids, output.logits, output.late_logits, draw)
        for row, sequence, assignment, beside in zip(rows.firsts, sequences, assignments, guesses, strict=True):
            policy, plan, decider = assignment.policy, output.plans[row], rows.decider_of[row]
            recorded = output, row, decider, started_ns
            num_evaluations = decider.num_evaluations
            own_exposed_ns = 0 if assignment.is_planned else exposed_ns
            if sequence.is_drafting:
                cost = sequence.log.add_draft_token(plan, policy.head, num_evaluations, own_exposed_ns)
                if beside:
                    assert assignment.drafting is not None
                    sequence.log.add_guess(plan, added := cost * assignment.drafting.second_row)
                    cost += added
                own_draft = sequence.draft(output.logits_from(row), likeliest_ids[row:], cost, elapsed_ns, beside)
                for place, token_id in enumerate(own_draft):
                    recorded = output, row + place, decider, started_ns
                    sequence.recorder.add_pass(StepKind.DRAFT, token_id, 0.0 if place else cost, *recorded)
                continue
            if beside:
                self._take_guessed(sequence, beside, likeliest_ids, recorded, events)
                continue
            if sequence.speculation is not None:
                sequence.speculation.decoded()
            self._count(sequence, decider, plan, own_exposed_ns, sequence.cache.length)
            has_room = sequence.recorder.has_room
            cost = sequence.log.cost_of(plan, policy.head, num_evaluations) if has_room else 0.0
            sequence.recorder.add_pass(StepKind.DECODE, chosen_ids[row], cost, *recorded)
            self._take(sequence, chosen_ids[row], output.logits, row, plan, events)

    def _take_guessed(
        self,
        sequence: Sequence,
        guesses: list[int],
        likeliest_ids: Several[int],
        recorded: tuple[StepOutput, int, Decider, int],
        events: Events,
    ) -> None:
        """Takes the tokens of a pass that ran these guesses beside the last token, as far as they were right. Keys and
        values of wrong ones are dropped."""
        output, first, by, started_ns = recorded
        plan, num_rows = output.plans[first], 1 + len(guesses)
        cost = sequence.count_rows(plan, by.policy.head, num_rows)
        for place in range(num_rows):
            row = first + place
            own = {row: sequence.sampler}, likeliest_ids, output.logits, output.late_logits, self._decoder.draw
            token_id = choose_tokens(*own)[row]
            sequence.recorder.add_pass(StepKind.DECODE, token_id, 0.0 if place else cost, output, row, by, started_ns)
            self._take(sequence, token_id, output.logits, row, sequence.count_token_of_rows(plan, place > 0), events)
            if sequence.request.request_id not in self._running:
                return
            if guesses[place : place + 1] != [token_id]:
                break
        sequence.keep_guesses(len(guesses), place)

    def _decode_burst(self, sequence: Sequence, assignment: Assignment, events: Events) -> bool:
        """Decodes several tokens of a sequence that runs alone; returns False if that cannot be now."""
        if not self.bursts.may_have(sequence):
            return False
        rows = self._recent_rows.next([sequence], [assignment], [1], None)
        num_positions, decider = sequence.cache.length, rows.deciders[0]
        if (burst := self.bursts.decode(rows, sequence)) is None:
            return False
        head, num_evaluations = decider.policy.head, decider.num_evaluations
        if self._step_clock is not None and burst.num_plain < burst.num_tokens:
            self._step_clock.begin(None)  # its tokens took different times
        each = zip(burst.token_ids, burst.plans, burst.num_rows, strict=True)
        for place, (token_id, plan, num_rows) in enumerate(each):
            cost = 0.0
            if num_rows == 1:
                self._count(sequence, decider, plan, 0, num_positions + place + 1)
                if sequence.recorder.has_room:
                    cost = sequence.log.cost_of(plan, head, num_evaluations)
            else:
                cost = sequence.count_rows(plan, head, num_rows) if num_rows else 0.0
                sequence.count_token_of_rows(plan, num_rows == 0)
            sequence.recorder.add_of_burst(burst, place, token_id, plan, cost)
            self._take(sequence, token_id, None, 0, plan, events)
        return True

    def _count(self, sequence: Sequence, by: Decider, plan: bytes, exposed_ns: int, num_positions: int) -> None:
        """Counts what a decoded token took."""
        head, num_evaluations = by.policy.head, by.num_evaluations
        sequence.log.append_decode_token(plan, head, num_evaluations, exposed_ns)
        if self._step_clock is not None:
            self._step_clock.ran(by.policy.name, plan, head, num_evaluations, num_positions)

    def _verify(self, sequences: list[Sequence], events: Events) -> None:
        """Runs complete drafts at full depth in one pass and outputs the accepted tokens. The drafts' keys and values
        are dropped first, so that accepted tokens keep full depth's."""
        started_ns = time.perf_counter_ns()
        token_ids = [sequence.take_back_draft() for sequence in sequences]
        lengths = [len(ids) for ids in token_ids]
        batch = full_depth_batch(self._decoder, PassKind.VERIFY, sequences, lengths)
        # A sequence that runs alone does not depend on its neighbours.
        kind = PassKind.DECODE if len(sequences) > 1 else PassKind.VERIFY
        ids = [token_id for own in token_ids for token_id in own]
        wants_logits = any(sequence.wants_logits for sequence in sequences)
        logits, likeliest_ids = self._decoder.run_tokens(Action.FULL, ids, batch, Action.FULL, kind, wants_logits)
        batch.commit()
        all_logits = [None] * len(sequences) if logits is None else logits.split(lengths)
        ends = accumulate(lengths)
        chosen = [
            sequence.verify(own, likeliest_ids[end - length : end])
            for sequence, own, length, end in zip(sequences, all_logits, lengths, ends, strict=True)
        ]
        elapsed_ns = time.perf_counter_ns() - started_ns
        for sequence, logits, (ids, accepted, from_text, cost) in zip(sequences, all_logits, chosen, strict=True):
            assert sequence.speculation is not None
            sequence.speculation.verification_ns += elapsed_ns
            sequence.recorder.add_verification(ids, accepted, from_text, cost, started_ns)
            for row, token_id in enumerate(ids):  # rejected tokens have logits, but no id
                self._take(sequence, token_id, logits, row, sequence.log.append_counted_token(), events)

    def _take(
        self, sequence: Sequence, token_id: int, logits: Tensor | None, row: int, plan: bytes, events: Events
    ) -> None:
        """Puts out a token, which was chosen from this row of logits `[rows, vocab_size]`; without them nobody may want
        logarithms."""
        if refusal := sequence.refusal():
            events.append(refusal)
            self._release(sequence)
            return
        events.append(sequence.produced(token_id, plan, logits, row))
        if reason := sequence.append(token_id):
            events.append(self._finish(sequence, reason))

    def _finish(self, sequence: Sequence, reason: EndReason) -> EngineEvent:
        self._release(sequence)
        return sequence.finished(reason)

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.request.request_id]
        self._pool.release(sequence.cache)
