"""Continuous batching: sequences take slots, are prefilled in chunks and decoded together, token by token.

Knows sequences, slots and events; knows no text, no transport and no clock but for its statistics.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig, GenerationRequest, ModelFacts
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.kv_cache import CachePool
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.planner import GroupPlanner
from dash_runtime.engine.sampling import token_logprobs
from dash_runtime.engine.sequence import EndReason, EngineEvent, Sequence, SlotGranted, TokenProduced
from dash_runtime.engine.step import Decider, decode_step
from dash_runtime.policy.catalog import PolicyCatalog


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: GenerationRequest
    since: float


class Engine:
    """Serves generation requests step by step. Not thread-safe: one caller owns it."""

    def __init__(
        self,
        decoder: Decoder,
        catalog: PolicyCatalog,
        lane: Lane,
        facts: ModelFacts,
        config: EngineConfig,
        planner: GroupPlanner | None = None,
    ) -> None:
        self.facts = facts
        self._decoder = decoder
        self._catalog = catalog
        self._lane = lane
        self._planner = planner
        self._config = config
        self._pool = CachePool(decoder.config, config.cache_tokens, decoder.dtype, decoder.device)
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._waiting or self._running)

    @property
    def num_reserved_cache_tokens(self) -> int:
        """Tokens that running sequences may still fill."""
        return self._pool.reserved_tokens

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request; it gets a slot in one of the next steps, first come, first served.

        Raises:
            InvalidRequest: the request does not fit this model; nothing is queued.
        """
        self.facts.validate(request)
        self._waiting.append(_Waiting(request, time.monotonic()))

    def cancel(self, request_id: str) -> None:
        """Forgets a request wherever it is; unknown ids are ignored."""
        self._waiting = deque(w for w in self._waiting if w.request.request_id != request_id)
        if sequence := self._running.pop(request_id, None):
            self._pool.release(sequence.cache)

    def stop(self, request_id: str) -> list[EngineEvent]:
        """Ends a running request now, because its caller met a stop string; unknown ids are ignored."""
        sequence = self._running.get(request_id)
        return [] if sequence is None else [self._finish(sequence, EndReason.STOP_STRING)]

    @torch.inference_mode()
    def step(self) -> list[EngineEvent]:
        """Grants free slots, prefills one chunk of prompts, decodes one token of every sequence that is past
        its prompt, and returns what happened."""
        events: list[EngineEvent] = []
        self._grant_slots(events)
        decoding = [sequence for sequence in self._running.values() if not sequence.num_prompt_tokens_left]
        self._prefill(events)
        if decoding:
            self._decode(decoding, events)
        return events

    def close(self) -> None:
        """Stops the lane."""
        self._lane.close()

    def _grant_slots(self, events: list[EngineEvent]) -> None:
        while self._waiting and len(self._running) < self._config.num_slots:
            waiting = self._waiting[0]
            request = waiting.request
            cache = self._pool.reserve(len(request.prompt_token_ids) + request.stopping.max_new_tokens)
            if cache is None:
                return  # the oldest waits for room rather than being overtaken by smaller ones for ever
            self._waiting.popleft()
            assignment = self._catalog.assign(request.skip)
            sequence = Sequence(request, assignment, cache, self._decoder.num_layers, waiting.since)
            self._running[request.request_id] = sequence
            events.append(
                SlotGranted(
                    request.request_id,
                    assignment.policy.name,
                    assignment.compute_budget,
                    sequence.queue_seconds,
                )
            )

    def _prefill(self, events: list[EngineEvent]) -> None:
        """Prefills about a chunk of prompt tokens at full depth, so that a long prompt does not hold up the others.

        One sequence at a time, each cut at the same places whatever runs beside it: a sequence's numbers do not
        depend on its neighbours.
        """
        num_prefilled = 0
        for sequence in list(self._running.values()):
            if num_prefilled >= self._config.prefill_chunk_tokens:
                return
            if not sequence.num_prompt_tokens_left:
                continue
            chunk = sequence.next_prompt_chunk(self._config.prefill_chunk_tokens)
            num_prefilled += len(chunk)
            hidden = self._run_full_depth(sequence, chunk)
            if not sequence.num_prompt_tokens_left:
                logits = self._decoder.logits(hidden[-1:], (Action.FULL,))
                plan = sequence.log.append_prefill_token()
                self._take(sequence, sequence.sampler.sample(logits[0]), logits[0], plan, events)

    def _run_full_depth(self, sequence: Sequence, token_ids: list[int]) -> Tensor:
        compensation = sequence.assignment.policy.compensation
        batch = self._decoder.rows([sequence.cache], [len(token_ids)], [compensation])
        actions = (Action.FULL,) * len(token_ids)
        hidden = self._decoder.embed(token_ids)
        for layer in range(self._decoder.num_layers):
            hidden = self._decoder.run_layer(layer, actions, hidden, batch)
        batch.commit()
        return hidden

    def _decode(self, sequences: list[Sequence], events: list[EngineEvent]) -> None:
        compensations = [sequence.assignment.policy.compensation for sequence in sequences]
        deciders = _deciders(sequences)
        batch = self._decoder.rows([s.cache for s in sequences], [1] * len(sequences), compensations)
        exposed_before = self._lane.exposed_ns
        planner = self._planner if len(sequences) > 1 else None  # a row alone has none to agree with
        token_ids = [sequence.output_ids[-1] for sequence in sequences]
        output = decode_step(self._decoder, self._lane, batch, token_ids, deciders, planner)
        exposed_ns = self._lane.exposed_ns - exposed_before
        greedy = output.logits.argmax(dim=-1).tolist()
        for row, sequence in enumerate(sequences):
            sampler = sequence.sampler
            token_id = greedy[row] if sampler.is_plain_greedy else sampler.sample(output.logits[row])
            plan = output.plans[row]
            has_decisions = len(sequence.assignment.policy.pinned) < self._decoder.num_layers
            sequence.log.append_decode_token(plan, sequence.assignment.policy.head, exposed_ns if has_decisions else 0)
            self._take(sequence, token_id, output.logits[row], plan, events)

    def _take(self, sequence: Sequence, token_id: int, logits: Tensor, plan: bytes, events: list[EngineEvent]) -> None:
        request = sequence.request
        logprobs = None if request.logprobs is None else token_logprobs(logits, token_id, request.logprobs)
        shown_plan = plan if request.return_decisions else b""
        events.append(TokenProduced(request.request_id, token_id, shown_plan, logprobs))
        if reason := sequence.append(token_id, self.facts.eos_token_ids):
            events.append(self._finish(sequence, reason))

    def _finish(self, sequence: Sequence, reason: EndReason) -> EngineEvent:
        del self._running[sequence.request.request_id]
        self._pool.release(sequence.cache)
        return sequence.finished(reason)


def _deciders(sequences: list[Sequence]) -> list[Decider]:
    """One decider per policy in the batch."""
    rows_by_policy: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        rows_by_policy.setdefault(id(sequence.assignment.policy), []).append(row)
    deciders: list[Decider] = []
    for rows in rows_by_policy.values():
        assignment = sequences[rows[0]].assignment
        tokens = [sequences[row].next_token() for row in rows]
        deciders.append(Decider(assignment.policy, rows, tokens, assignment.costs, len(sequences)))
    return deciders
