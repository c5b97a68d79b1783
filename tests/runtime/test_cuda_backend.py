"""Decoding by graphs computes what eager layers do, with few launches, and nothing races.

Without CUDA, streams and graphs are imitated, and a checker watches them (`imitated_cuda.py`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.decoder.backends import cuda as cuda_backend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import device_of
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.planner import HighestAction
from dash_runtime.engine.sampling import Sampler, scores_of
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.static_rows import StaticRows
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.startup.measured_engine import assemble_engine
from tests.marks import long
from tests.runtime.imitated_cuda import imitated_cuda
from tests.runtime.random_policy import random_policy
from tests.runtime.support import (
    CPU,
    drain,
    finished,
    full_plan,
    load_decoder,
    run_rows,
    some_affine,
    some_costs,
    some_low_rank,
    tokens,
)

RUNNING = (Action.FULL, Action.INT8, Action.INT4)
ROUNDED = {Action.INT8, Action.INT4}
FULL_DEPTH = SkipOptions(Mode.FULL_DEPTH)
ADAPTIVE = SkipOptions(Mode.ADAPTIVE, compute_budget=0.6)


def plans_of(num_layers: int, num_rows: int, step: int, action: Action) -> list[list[Action]]:
    """Returns plans in which all rows that run have one action, and which rows skip differs from layer to layer."""
    return [
        [Action.SKIP if (row * layer + step) % 3 == 1 else action for layer in range(num_layers)]
        for row in range(num_rows)
    ]


def decoded(
    decoder: Decoder, num_rows: int, compensation: Compensation, num_steps: int = 6, running: Sequence[Action] = RUNNING
) -> Tensor:
    """Returns the logits of some steps of several sequences, the last one at full depth."""
    caches = decoder.caches([32] * num_rows)
    for row, cache in enumerate(caches):
        run_rows(decoder, [cache], [range(1, 4 + row % 7)], [full_plan(decoder)])
    steps: list[Tensor] = []
    for step in range(num_steps):
        is_last = step == num_steps - 1
        kv_action = running[step % len(running)]  # a row that skips beside others has its keys from their product
        plans = plans_of(decoder.num_layers, num_rows, step, kv_action)
        if is_last:
            plans = [list(full_plan(decoder))] * num_rows
        token_ids = [[7 * row + step] for row in range(num_rows)]
        steps.append(run_rows(decoder, caches, token_ids, plans, compensation, kv_action).clone())
    return torch.cat(steps)


@pytest.mark.parametrize("num_rows", [1, 17, *long([2, 3, 8])])
def test_graphs_compute_what_layers_do(tiny_folder: Path, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = load_decoder(tiny_folder)
    compensations = some_affine(eager), some_low_rank(eager)
    expected = [decoded(eager, num_rows, compensation) for compensation in compensations]
    with imitated_cuda(monkeypatch) as cuda:
        decoder = load_decoder(tiny_folder, has_graphs=True)
        for compensation, own in zip(compensations, expected, strict=True):
            torch.testing.assert_close(decoded(decoder, num_rows, compensation), own, rtol=1e-4, atol=1e-4)
    assert cuda.errors == []


def policy_of(folder: Path, without: set[Action], lookahead: int = 1) -> LearnedPolicy:
    return random_policy(folder, block_size=1, lookahead=lookahead).without(without)


def engine_of(decoder: Decoder, policy: LearnedPolicy, num_slots: int = 17, record_steps: int = 0) -> Engine:
    catalog = PolicyCatalog(some_costs(6), policy.score_actions, policy.compensation, [policy], None, {}, 1.0, ())
    config = EngineConfig(num_slots=num_slots, cache_tokens=32 * num_slots, record_steps=record_steps)
    return assemble_engine(decoder, catalog, config, 512, frozenset(), planner=HighestAction())


def prepare(engine: Engine, policy: LearnedPolicy) -> None:
    """Captures all graphs that requests with this policy replay."""
    work = engine.graph_work()
    for context in work.contexts:
        for piece in work.layers(policy.compensation, context):
            piece()
    for piece in work.decisions(policy):
        piece()


def generated(engine: Engine, num_rows: int, skip: SkipOptions, num_tokens: int = 5) -> list[list[int]]:
    for row in range(num_rows):
        stopping = StoppingParameters(num_tokens)
        prompt = [1 + row, 2, 3 + 5 * row]
        engine.submit(GenerationRequest(str(row), prompt, stopping, SamplingParameters(), skip=skip))
    events = drain(engine)
    return [tokens(events[str(row)]) for row in range(num_rows)]


@pytest.mark.parametrize("num_rows", [1, 5, *long([2, 17])])
@pytest.mark.parametrize(
    ("skip", "without"),
    [(FULL_DEPTH, set()), (SkipOptions(Mode.FIXED, fixed_action=Action.INT4), set()), (ADAPTIVE, ROUNDED)],
    ids=["full", "int4", "adaptive"],
)
def test_an_engine_gives_the_tokens_of_eager_layers_and_nothing_races(
    tiny_folder: Path, num_rows: int, skip: SkipOptions, without: set[Action], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_folder, without)
    expected = generated(engine_of(load_decoder(tiny_folder), policy), num_rows, skip)
    with imitated_cuda(monkeypatch) as cuda:
        own = generated(engine_of(load_decoder(tiny_folder, has_graphs=True), policy), num_rows, skip)
    assert own == expected
    assert cuda.errors == []


@pytest.mark.parametrize("num_rows", [1, 16])
def test_a_layer_takes_two_launches_at_most_no_upload_and_no_wait_but_for_its_decision(
    tiny_folder: Path, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, num_tokens = policy_of(tiny_folder, set()), 12
    with imitated_cuda(monkeypatch) as cuda:
        engine = engine_of(load_decoder(tiny_folder, has_graphs=True), policy)
        generated(engine, num_rows, ADAPTIVE, num_tokens)
        for row in range(num_rows):
            prompt = [1 + row, 2, 3 + 5 * row]
            engine.submit(GenerationRequest(str(row), prompt, StoppingParameters(num_tokens), skip=ADAPTIVE))
        while any(sequence.num_prompt_tokens_left for sequence in engine._running.values()) or not engine._running:
            engine.step()
        before = Counter(cuda.counts)
        engine.step()
    taken = cuda.counts - before
    num_layers, num_decisions = 6, len(policy.spec.decision_blocks)
    assert taken["captures"] == 0
    assert taken["launches"] <= 2 * num_layers + 4  # the pass's beginning, the head, the likeliest token and its copy
    assert taken["uploads"] == 0
    assert taken["waits"] <= num_decisions + 2  # one before the rows are written, one for the tokens


@pytest.mark.parametrize("ignores", ["wait_event", "synchronize"])
def test_a_forgotten_wait_is_a_race_that_the_checker_sees(
    tiny_folder: Path, ignores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with imitated_cuda(monkeypatch, ignores) as cuda:
        generated(engine_of(load_decoder(tiny_folder, has_graphs=True), policy_of(tiny_folder, ROUNDED)), 2, ADAPTIVE)
    assert any("nothing orders them" in error for error in cuda.errors)


@pytest.mark.parametrize("num_states", [7, 2])
def test_a_state_that_is_overwritten_before_the_policy_has_read_it_is_a_race(
    tiny_folder: Path, num_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lookahead of two, the next layer is queued before the decision from this one's input has been read."""

    class FewStates(StaticRows):
        def state(self, layer: int, num_rows: int) -> Tensor:
            return super().state(layer % num_states, num_rows)

    with imitated_cuda(monkeypatch) as cuda:
        monkeypatch.setattr(cuda_backend, "StaticRows", FewStates)
        policy = policy_of(tiny_folder, ROUNDED, lookahead=2)
        generated(engine_of(load_decoder(tiny_folder, has_graphs=True), policy), 2, ADAPTIVE)
    assert bool(cuda.errors) == (num_states == 2)


def test_passes_that_nobody_reads_do_not_overwrite_where_the_device_reads_its_rows(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ignores in ("", "synchronize"):
        with imitated_cuda(monkeypatch, ignores) as cuda:
            decoded(load_decoder(tiny_folder, has_graphs=True), 2, some_affine(load_decoder(tiny_folder)))
        assert bool(cuda.errors) == bool(ignores)


def test_a_graph_that_reads_memory_which_moves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [torch.ones(3)]
    with imitated_cuda(monkeypatch) as cuda:
        replay = device_of(CPU).make_capture()(lambda: kept[-1].add_(1))
        replay()
        assert cuda.errors == []
        kept.append(torch.ones(3))
        replay()
    assert "something else than was captured" in cuda.errors[0]


def test_prepared_graphs_are_those_that_requests_replay(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tiny_folder, set())
    with imitated_cuda(monkeypatch) as cuda:
        monkeypatch.setattr(cuda_backend, "_SHORTEST_CONTEXT", 8)
        engine = engine_of(load_decoder(tiny_folder, has_graphs=True), policy, num_slots=2)
        prepare(engine, policy)
        before = Counter(cuda.counts)
        for num_rows in (1, 2):
            for skip in (FULL_DEPTH, ADAPTIVE):
                generated(engine, num_rows, skip, num_tokens=8)  # more positions than the shortest context has
    assert (cuda.counts - before)["captures"] == 0
    assert cuda.errors == []


@pytest.mark.parametrize("num_rows", [3, *long([1])])
def test_a_served_step_captures_nothing_and_gives_the_same_tokens_with_graphs_and_without(
    tiny_folder: Path, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_folder, {*Action} - {Action.SKIP, Action.FULL})
    expected = generated(engine_of(load_decoder(tiny_folder), policy), num_rows, ADAPTIVE)
    with imitated_cuda(monkeypatch) as cuda:
        decoder = load_decoder(tiny_folder, actions=(Action.SKIP, Action.FULL), has_graphs=True)
        engine = engine_of(decoder, policy, num_slots=3)
        engine.may_capture = False
        assert generated(engine, num_rows, ADAPTIVE) == expected
        assert cuda.counts["captures"] == 0
        prepare(engine, policy)
        before = Counter(cuda.counts)
        assert generated(engine, num_rows, ADAPTIVE) == expected
    assert (cuda.counts - before)["captures"] == 0
    assert cuda.errors == []


def test_a_drafter_with_another_head_replays_its_policys_graphs(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_folder, {*Action} - {Action.SKIP, Action.FULL})
    with imitated_cuda(monkeypatch) as cuda:
        decoder = load_decoder(tiny_folder, actions=(Action.SKIP, Action.FULL), has_graphs=True)
        engine = engine_of(decoder, policy, num_slots=1)
        prepare(engine, policy)
        before = Counter(cuda.counts)
        for piece in engine.graph_work().decisions(replace(policy)):
            piece()
    assert (cuda.counts - before)["captures"] == 0


def test_memory_that_prepared_graphs_wrote_to_is_given_back_empty(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_folder, ROUNDED)
    with imitated_cuda(monkeypatch):
        engine = engine_of(load_decoder(tiny_folder, has_graphs=True), policy, num_slots=2)
        prepare(engine, policy)
        pool = engine._pool
        assert not pool.reserved_tokens
        assert not pool.memories[0][:, :, : pool.spare_token].any()


def test_a_recorded_request_has_its_layers_and_decisions_in_order(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_folder, set())
    with imitated_cuda(monkeypatch):
        engine = engine_of(load_decoder(tiny_folder, has_graphs=True), policy, record_steps=4)
        engine.submit(GenerationRequest("a", [1, 2, 3], StoppingParameters(4), skip=ADAPTIVE))
        trace = finished(drain(engine)["a"]).trace
    assert trace is not None
    for step in trace.steps:
        starts, ends = (memoryview(own).cast("I").tolist() for own in (step.layer_starts, step.layer_ends))
        marks = [mark for pair in zip(starts, ends, strict=True) for mark in pair]
        assert marks == sorted(marks)
        decided = memoryview(step.decision_starts).cast("I").tolist()
        assert [bool(at) for at in decided] == [layer not in policy.pinned for layer in range(6)]


SAMPLED = [
    SamplingParameters(temperature=0.8, seed=3),
    SamplingParameters(temperature=1.2, top_k=40, top_p=0.9, min_p=0.02, seed=4),
    SamplingParameters(temperature=0.7, top_p=0.8, seed=5, repetition_penalty=1.2, logit_bias={7: 2.0, 9: -1.0}),
    SamplingParameters(presence_penalty=0.5, frequency_penalty=0.3),
    SamplingParameters(),
]


def sampled(engine: Engine) -> list[list[int]]:
    for row, parameters in enumerate(SAMPLED):
        stopping = StoppingParameters(6)
        engine.submit(GenerationRequest(str(row), [1 + row, 2, 3], stopping, parameters, skip=FULL_DEPTH, logprobs=3))
    events = drain(engine)
    return [tokens(events[str(row)]) for row in range(len(SAMPLED))]


def test_sampled_rows_get_the_tokens_that_the_host_would_draw_in_one_wait(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_folder, ROUNDED)
    expected = sampled(engine_of(load_decoder(tiny_folder), policy))
    with imitated_cuda(monkeypatch) as cuda:
        engine = engine_of(load_decoder(tiny_folder, has_graphs=True), policy)
        assert sampled(engine) == expected
        logits = torch.randn(2, 260)
        before = cuda.counts["waits"]
        scores_of(logits, {row: Sampler(SAMPLED[row], [1]) for row in range(2)})
    assert cuda.counts["waits"] == before + 1
    assert cuda.errors == []
