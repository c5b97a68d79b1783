"""A worker without a model: speaks worker/messages.py over its socket to the server, and echoes the prompt for ever.

Its behaviour is in WorkerConfig.model, as `fake?folder=/path&token_seconds=0.01&…`:

folder           the folder with tokenizer.json
token_seconds    time between two steps; each step gives every running request one token
burst            tokens of a step for a request that runs alone, if it may have bursts
num_layers       length of a row of actions
die_after        exits silently after this many tokens
die_when_ready   exits silently as soon as it is ready
hang_after       sends and reads nothing after this many tokens
die_at_start     exits before it is ready
never_ready      waits for ever instead of becoming ready
starts_child     first starts a child process that sleeps
graphs_fail      cannot make graphs, and ends if it is asked to
startup_failed   refuses to start, with this text
refuse           answers every request with RequestRefused for this field
replaces_costs   says that it has replaced its cost table so often; the learned policy cannot go as low as before
keeps_records    never sends decision traces
budgets          the learned policy's lowest budget on each worker, as `0.3,0.5`

A request whose prompt is [PROBE_TOKEN_ID] gets, as token ids: requests running or queued beside it, and
the numbers of Submit, Cancel and Stop received so far.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from urllib.parse import parse_qsl, urlsplit

from dash_runtime.actions import Action
from dash_runtime.child_process import die_with_parent
from dash_runtime.config import GenerationRequest, Mode, ModelFacts, PolicyFacts, SkipOptions
from dash_runtime.decision_trace import DecisionTrace, StepKind, TraceStep, pack_float32, pack_uint32
from dash_runtime.events import (
    CostStatus,
    DepthStatistics,
    EndReason,
    EngineEvent,
    RequestRefused,
    SequenceCancelled,
    SequenceFinished,
    SlotGranted,
    TokenLogprobs,
    TokenProduced,
)
from dash_server.worker import messages
from dash_server.worker.__main__ import add_server_arguments, open_server
from dash_server.worker.server_socket import ServerGone, receive, send

END_TOKEN_ID = 257
PROBE_TOKEN_ID = 258
VOCAB_SIZE = 260
PINNED_LAYERS = (0, 2)
PRICE = 0.75
SCORE_ACTIONS = [Action.SKIP, Action.INT8, Action.FULL]


class Running:
    """One request in a slot."""

    def __init__(self, request: GenerationRequest, record_steps: int = 0) -> None:
        self.request = request
        self.record_steps = record_steps
        self.granted_unix_ns = self.last_token_unix_ns = time.time_ns()
        self.first_token: tuple[int, int] | None = None
        self.steps: list[TraceStep] = []
        self.tokens: Iterator[int] = cycle(request.prompt_token_ids)
        self.num_tokens = 0

    def step(self, num_layers: int) -> tuple[TokenProduced, EndReason | None]:
        """Returns the next token, and the reason if it is the last."""
        token_id = next(self.tokens)
        self.num_tokens += 1
        self.record(token_id, num_layers)
        request = self.request
        plan = bytes([Action.FULL] * num_layers) if request.return_decisions else b""
        logprobs = None
        if request.logprobs is not None:
            logprobs = TokenLogprobs(-0.5, [(rank, -float(rank)) for rank in range(request.logprobs)])
        reason = None
        if token_id in request.stopping.stop_token_ids:
            reason = EndReason.STOP_TOKEN
        elif token_id == END_TOKEN_ID and not request.stopping.ignore_eos:
            reason = EndReason.END_OF_SEQUENCE
        elif self.num_tokens == request.stopping.max_new_tokens:
            reason = EndReason.LENGTH
        return TokenProduced(request.request_id, token_id, plan, logprobs), reason

    def record(self, token_id: int, num_layers: int) -> None:
        """Records a made-up step, as long as the time between two tokens: each layer takes its share, each decision the
        second half of the layer before."""
        start, now = self.last_token_unix_ns, time.time_ns()
        self.last_token_unix_ns = now
        if self.first_token is None:
            self.first_token = token_id, now
        elif len(self.steps) < self.record_steps:
            nanos = (now - start) // (num_layers + 1)
            is_decided = [self.request.skip.mode.has_policy and n not in PINNED_LAYERS for n in range(num_layers)]
            scores = [[1.0, 0.5, -1.0] if decided else [0.0] * 3 for decided in is_decided]
            step = TraceStep(
                kind=StepKind.DECODE,
                token_ids=[token_id],
                start_unix_ns=start,
                duration_ns=now - start,
                actions=bytes(Action.INT8 if decided else Action.FULL for decided in is_decided),
                layer_starts=pack_uint32(nanos * n for n in range(num_layers)),
                layer_ends=pack_uint32(nanos * (n + 1) for n in range(num_layers)),
                decision_starts=pack_uint32(nanos * n - nanos // 2 if is_decided[n] else 0 for n in range(num_layers)),
                decision_ends=pack_uint32(max(1, nanos * n) if is_decided[n] else 0 for n in range(num_layers)),
                exposed=pack_uint32(7 * decided for decided in is_decided),
                scores=pack_float32(score for row in scores for score in row),
                cost_spent=pack_float32(n / num_layers for n in range(num_layers)),
                cost=0.75,
            )
            self.steps.append(step)

    def trace(self, num_layers: int) -> DecisionTrace:
        is_asked = self.request.skip.mode.has_policy
        first_token_id, first_token_unix_ns = self.first_token or (None, None)
        return DecisionTrace(
            request_id=self.request.request_id,
            policy=self.request.skip.policy_name or "toy",
            compute_budget=self.request.skip.compute_budget,
            price=PRICE if is_asked else None,
            num_layers=num_layers,
            pinned_layers=list(PINNED_LAYERS) if is_asked else list(range(num_layers)),
            score_actions=SCORE_ACTIONS,
            granted_unix_ns=self.granted_unix_ns,
            ended_unix_ns=time.time_ns(),
            first_token_id=first_token_id,
            first_token_unix_ns=first_token_unix_ns,
            steps=self.steps,
            num_unrecorded_steps=max(0, self.num_tokens - 1 - len(self.steps)),
        )

    def finished(self, reason: EndReason, trace: DecisionTrace | None = None) -> SequenceFinished:
        num_decode_tokens = self.num_tokens - 1
        return SequenceFinished(
            request_id=self.request.request_id,
            reason=reason,
            num_output_tokens=self.num_tokens,
            prefill_seconds=0.25,
            decode_seconds=0.5,
            depth=DepthStatistics(
                num_decode_tokens,
                [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
                {Action.INT4: 2},
                total_cost=0.75 * num_decode_tokens,
                exposed_ns=1_000_000 * num_decode_tokens,
            ),
            trace=trace,
        )


class FakeWorker:
    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.frames = messages.FrameReader()
        self.queued: list[GenerationRequest] = []
        self.running: dict[str, Running] = {}
        self.num_received = {messages.Submit: 0, messages.Cancel: 0, messages.Stop: 0}
        self.num_tokens = 0
        self.least_budget = 0.5

    def receive(self, timeout: float | None) -> list[messages.ToWorker]:
        return [messages.decode_to_worker(body) for body in self.frames.feed(receive(self.link, timeout))]

    def send(self, message: messages.FromWorker) -> None:
        send(self.link, messages.encode_frame(message))

    def run(self) -> None:
        received: list[messages.ToWorker] = []
        while not received:
            received = self.receive(None)
        config = received.pop(0)
        assert isinstance(config, messages.WorkerConfig)
        self.config = config
        self.options = dict(parse_qsl(urlsplit(config.model).query))
        self.num_layers = int(self.options.get("num_layers", 3))
        if "starts_child" in self.options:
            program = "from dash_runtime.child_process import die_with_parent as d; d(); import time; time.sleep(60)"
            subprocess.Popen([sys.executable, "-c", program])
        if "startup_failed" in self.options:
            self.send(messages.StartupFailed(self.options["startup_failed"]))
            return
        if "graphs_fail" in self.options and config.use_graphs:
            self.send(messages.GraphsFailed("a CUDA graph cannot be captured: out of memory"))
            sys.exit(4)
        if "die_at_start" in self.options:
            sys.exit(3)
        if "doing" in self.options:
            self.send(messages.Starting(self.options["doing"]))
        while "never_ready" in self.options:
            self.receive(None)
        if "budgets" in self.options:
            self.least_budget = float(self.options["budgets"].split(",")[config.worker_number])
        self.send(messages.Ready(self.facts(), self.options["folder"], 0.1))
        if "die_when_ready" in self.options:
            os._exit(1)
        if replacements := int(self.options.get("replaces_costs", 0)):
            self.least_budget += 0.2
            self.send(messages.CostsJudged(CostStatus(replacements, 0.015), self.facts()))
        token_seconds = float(self.options.get("token_seconds", 0))
        while True:
            events: list[EngineEvent] = []
            for message in received:
                self.handle(message, events)
            self.step(events)
            if events:
                self.send(messages.StepEvents(events))
            if token_seconds and self.running:
                time.sleep(token_seconds)
            received = self.receive(0 if self.running or self.queued else None)

    def handle(self, message: messages.ToWorker, events: list[EngineEvent]) -> None:
        if type(message) in self.num_received:
            self.num_received[type(message)] += 1
        match message:
            case messages.Submit(request=request) if "refuse" in self.options:
                events.append(RequestRefused(request.request_id, self.options["refuse"], "is refused"))
            case messages.Submit(request=request) if request.prompt_token_ids == [PROBE_TOKEN_ID]:
                self.answer_probe(Running(request), events)
            case messages.Submit(request=request):
                self.queued.append(replace(request, skip=self.with_budget(request.skip)))
            case messages.Cancel(request_id=request_id):
                if (running := self.running.pop(request_id, None)) is not None:
                    events.append(SequenceCancelled(request_id, self.trace_of(running)))
                self.queued = [request for request in self.queued if request.request_id != request_id]
            case messages.Stop(request_id=request_id) if request_id in self.running:
                running = self.running.pop(request_id)
                events.append(running.finished(EndReason.STOP_STRING, self.trace_of(running)))
            case messages.Ping():
                self.send(messages.Pong())
            case messages.Shutdown():
                sys.exit(0)

    def with_budget(self, skip: SkipOptions) -> SkipOptions:
        if not skip.mode.has_policy or skip.compute_budget is not None:
            return skip
        policy = self.facts().policy(skip.policy_name, skip.mode)
        return replace(skip, compute_budget=policy.default_budget(skip.mode, self.config.engine.default_compute_budget))

    def trace_of(self, running: Running) -> DecisionTrace | None:
        is_told = running.record_steps and "keeps_records" not in self.options
        return running.trace(self.num_layers) if is_told else None

    def answer_probe(self, probe: Running, events: list[EngineEvent]) -> None:
        request_id = probe.request.request_id
        numbers = [len(self.running) + len(self.queued), *self.num_received.values()]
        probe.num_tokens = len(numbers)
        events.append(SlotGranted(request_id, "full-depth", None, 0.0))
        events += [TokenProduced(request_id, number) for number in numbers]
        events.append(probe.finished(EndReason.LENGTH))

    def step(self, events: list[EngineEvent]) -> None:
        while self.queued and len(self.running) < self.config.engine.num_slots:
            request = self.queued.pop(0)
            self.running[request.request_id] = Running(request, self.config.engine.record_steps)
            policy = "full-depth" if request.skip.mode is Mode.FULL_DEPTH else request.skip.policy_name or "toy"
            note = "not a learned policy" if policy == "toy" else ""
            events.append(SlotGranted(request.request_id, policy, request.skip.compute_budget, 0.125, note))
        is_alone = len(self.running) == 1 and self.config.engine.burst_milliseconds > 0
        for request_id, running in list(self.running.items()):
            may_burst = is_alone and not running.request.is_immediate
            for _ in range(int(self.options.get("burst", 1)) if may_burst else 1):
                token, reason = running.step(self.num_layers)
                events.append(token)
                self.num_tokens += 1
                if reason is not None:
                    del self.running[request_id]
                    events.append(running.finished(reason, self.trace_of(running)))
                    break
        if self.num_tokens >= int(self.options.get("die_after", sys.maxsize)):
            os._exit(1)
        while self.num_tokens >= int(self.options.get("hang_after", sys.maxsize)):
            time.sleep(1)

    def facts(self) -> ModelFacts:
        def policy(name: str, note: str, lowest_budget: float) -> PolicyFacts:
            costs = {Action.SKIP: 0.1, Action.INT8: 0.5, Action.FULL: 1.0}
            return PolicyFacts(
                name, note, name == "learned", 1, PINNED_LAYERS, costs, lowest_budget, lowest_budget + 0.05, "scale"
            )

        engine = self.config.engine
        return ModelFacts(
            name="fake",
            architecture="FakeForCausalLM",
            num_layers=self.num_layers,
            vocab_size=VOCAB_SIZE,
            context_length=engine.context_length or 4096,
            cache_tokens=engine.cache_tokens,
            num_slots=engine.num_slots,
            eos_token_ids=frozenset({END_TOKEN_ID}),
            actions=(Action.SKIP, Action.INT8, Action.FULL),
            policies=(policy("toy", "not a learned policy", 0.9), policy("learned", "", self.least_budget)),
            device="fake",
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_server_arguments(parser)
    die_with_parent()
    with contextlib.suppress(ServerGone):
        FakeWorker(open_server(parser.parse_args())).run()
