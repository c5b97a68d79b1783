"""A request that decodes alone gets several tokens of a step, the same as one by one."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SamplingParameters, SkipOptions
from dash_runtime.config import StoppingParameters as Stopping
from dash_runtime.decision_trace import unpack_uint32
from dash_runtime.decoder.backends.native import NativeBackend
from dash_runtime.engine.bursts import MOST_IN_BURST, Bursts
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import ConfigError
from dash_runtime.events import EndReason, EngineEvent, SequenceFinished, TokenProduced
from dash_runtime.layers.batch import PassKind
from dash_runtime.passes import Limit
from dash_runtime.startup.build import BuildOptions, build_engine
from tests.runtime.native_model import NUM_THREADS, SmallModel, save_small_model
from tests.runtime.random_policy import NAME
from tests.runtime.support import drain, finished, tokens

MANY_SECONDS = 3600.0
"""No stall of the machine makes a burst shorter."""
NUM_TOKENS = 90
PROMPT = list(range(1, 20))
DRAWN = SamplingParameters(temperature=1.0, top_p=0.9, seed=4)
MODES = {
    "full depth": SkipOptions(Mode.FULL_DEPTH),
    "adaptive": SkipOptions(Mode.ADAPTIVE, policy_name=NAME),
    **{action.name: SkipOptions(Mode.FIXED, fixed_action=action) for action in Action},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_model: SmallModel) -> SmallModel:
    """One whose head runs natively in FULL, too: its vocabulary fills blocks."""
    own = save_small_model(tmp_path_factory.mktemp("bursts"), vocab_size=320)
    own.cache_folder.mkdir()
    (own.cache_folder / "native").symlink_to(small_model.cache_folder / "native")
    return own


@pytest.fixture(scope="module")
def engine(model: SmallModel) -> Iterator[Engine]:
    engine = engine_of(model)
    yield engine
    engine.close()


def engine_of(model: SmallModel, **options: float) -> Engine:
    own = BuildOptions(
        devices=["cpu"],
        num_threads=NUM_THREADS,
        policy_file=model.policy_file,
        actions=tuple(Action),
        checks_kept_costs=False,
    )
    # A guess of prompt lookup that is right gives several tokens too, and a random model may repeat itself.
    config = EngineConfig(num_slots=2, cache_tokens=1024, prompt_lookup=False, **options)  # type: ignore[arg-type]
    engine = build_engine(model.folder, model.cache_folder, own, config, lambda _: None)
    if config.burst_milliseconds:
        engine.bursts = Bursts(engine._decoder, MANY_SECONDS)
    return engine


def may_burst(engine: Engine, mode: str) -> bool:
    """Returns False for what has a head in FULL where that is not native: where oneDNN packs no bf16, as on AVX2."""
    backend = engine._decoder.backends[PassKind.DECODE][0]
    assert isinstance(backend, NativeBackend)
    return mode not in ("full depth", "FULL", "SKIP") or backend.heads.of([Action.FULL], wants_logits=False) is not None


def request(mode: str = "INT4", **changes: object) -> GenerationRequest:
    stopping = Stopping(NUM_TOKENS, ignore_eos=True)
    own = GenerationRequest("own", PROMPT, stopping, skip=MODES[mode], return_decisions=True)
    return replace(own, **changes)  # type: ignore[arg-type]


def tokens_of_steps(engine: Engine) -> list[list[EngineEvent]]:
    """Returns the tokens of each step until the engine has no work."""
    steps: list[list[EngineEvent]] = []
    while engine.has_work:
        steps.append([event for event in engine.step() if isinstance(event, TokenProduced)])
    return steps


@pytest.mark.parametrize("sampling", [SamplingParameters(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_that_come_together_are_those_that_come_one_by_one(
    engine: Engine, mode: str, sampling: SamplingParameters
) -> None:
    runs: list[list[EngineEvent]] = []
    for is_immediate in (True, False):
        engine.submit(request(mode, sampling=sampling, is_immediate=is_immediate))
        steps = []
        while engine.has_work:
            steps.append(engine.step())
        assert (max(map(len, steps)) > 3) is (may_burst(engine, mode) and not is_immediate)
        runs.append([event for step in steps for event in step])
    alone, together = runs
    produced = [[event for event in events if isinstance(event, TokenProduced)] for events in runs]
    assert produced[0] == produced[1]
    depths = [finished(events).depth for events in (alone, together)]
    for name in ("num_decode_tokens", "speculative_action_counts", "layer_action_counts"):
        assert getattr(depths[0], name) == getattr(depths[1], name)
    assert depths[0].total_cost == pytest.approx(depths[1].total_cost)
    assert finished(together).reason is EndReason.LENGTH
    assert len(tokens(together)) == NUM_TOKENS


@pytest.mark.parametrize("mode", ["full depth", "exact"])
def test_tokens_are_the_same_whether_logits_are_wanted_or_not(engine: Engine, mode: str) -> None:
    """By the request, by a neighbour in the same steps, or by nobody."""
    own = replace(request("full depth"), skip=SkipOptions(Mode.EXACT)) if mode == "exact" else request("full depth")

    def own_tokens(*requests: GenerationRequest) -> list[int]:
        for each in requests:
            engine.submit(each)
        return tokens(drain(engine)["own"])

    plain = own_tokens(own)
    assert len(set(plain)) > 5
    others = replace(own, sampling=SamplingParameters(logit_bias={plain[5]: -100.0}))
    assert plain[5] not in own_tokens(others)
    assert own_tokens(others) == own_tokens(replace(others, logprobs=2))
    assert own_tokens(replace(own, logprobs=2)) == plain
    for sampling in (SamplingParameters(), DRAWN):
        assert own_tokens(own, request(request_id="beside", sampling=sampling)) == plain


def test_steps_have_several_tokens_unless_they_are_wanted_at_once(engine: Engine) -> None:
    engine.submit(request())
    assert max(len(step) for step in tokens_of_steps(engine)) > 3
    engine.submit(request(is_immediate=True))
    assert max(map(len, tokens_of_steps(engine))) == 1


@pytest.mark.parametrize("sampling", [SamplingParameters(), DRAWN], ids=["greedy", "drawn"])
def test_a_burst_ends_when_somebody_writes_and_the_tokens_are_the_same(
    engine: Engine, sampling: SamplingParameters
) -> None:
    engine.submit(request(sampling=sampling))
    (events,) = drain(engine).values()
    whole = tokens(events)
    reader, writer = os.pipe()
    engine.bursts.wake_file = reader
    try:
        engine.submit(request(sampling=sampling))
        steps = [tokens(engine.step())]
        while len(steps[-1]) < 4:
            steps.append(tokens(engine.step()))
        os.write(writer, b"x")
        ones = [tokens(engine.step()) for _ in range(4)]
        os.read(reader, 1)
        rest = [tokens(step) for step in tokens_of_steps(engine)]
    finally:
        engine.bursts.wake_file = None
        os.close(reader)
        os.close(writer)
    assert [len(step) for step in ones] == [1] * 4
    assert max(map(len, rest)) > 3
    assert [token for step in (*steps, *ones, *rest) for token in step] == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": 1},
        {"sampling": SamplingParameters(temperature=1.0, repetition_penalty=1.2)},
        {"skip": SkipOptions(Mode.EXACT)},
    ],
    ids=["logprobs", "penalties", "exact"],
)
def test_what_looks_at_each_token_gets_its_tokens_as_before(engine: Engine, changes: dict[str, object]) -> None:
    first, second = request(**changes), request(is_immediate=True, **changes)
    runs = []
    for own in (first, second):
        engine.submit(own)
        runs.append(tokens_of_steps(engine))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("number", range(4, 9))
def test_a_burst_ends_with_the_token_that_ends_the_output(engine: Engine, number: int) -> None:
    engine.submit(request())
    (events,) = drain(engine).values()
    whole = tokens(events)
    stop = list(dict.fromkeys(whole))[number]
    place = whole.index(stop)
    engine.submit(request(stopping=Stopping(NUM_TOKENS, stop_token_ids=frozenset({stop}), ignore_eos=True)))
    (events,) = drain(engine).values()
    assert tokens(events) == whole[: place + 1]
    assert finished(events).reason is EndReason.STOP_TOKEN
    assert isinstance(events[-1], SequenceFinished)
    assert engine.num_reserved_cache_tokens == 0


def test_neighbours_decode_token_by_token_and_a_newcomer_waits_for_few_steps(engine: Engine) -> None:
    engine.submit(request())
    while engine.has_work and len(engine.step()) < 3:
        pass
    assert engine.has_work
    engine.submit(request(request_id="newcomer"))
    num_steps, has_come = 0, False
    while not has_come:
        has_come = any(event.request_id == "newcomer" for event in engine.step() if isinstance(event, TokenProduced))
        num_steps += 1
    assert num_steps <= engine._decoder.num_layers + 1  # each runs a layer of its prompt at least
    while len(engine._running) == 2:
        step = [event.request_id for event in engine.step() if isinstance(event, TokenProduced)]
        assert len(step) == len(set(step))
    drain(engine)


def test_drawn_tokens_are_the_same_alone_and_beside_others(engine: Engine) -> None:
    engine.submit(request("full depth", sampling=DRAWN))
    (alone,) = drain(engine).values()
    engine.submit(request("full depth", sampling=DRAWN))
    engine.submit(request("full depth", sampling=replace(DRAWN, seed=9), request_id="other"))
    together = drain(engine)
    assert tokens(together["own"]) == tokens(alone)
    assert tokens(together["other"]) != tokens(alone)


@pytest.mark.parametrize("mode", ["full depth", "adaptive", "INT4"])
def test_steps_of_bursts_are_recorded_like_others(model: SmallModel, mode: str) -> None:
    engine, traces = engine_of(model, record_steps=12), []
    for is_immediate in (True, False):
        engine.submit(request(mode, is_immediate=is_immediate))
        steps = []
        while engine.has_work:
            steps.append(engine.step())
        assert (max(map(len, steps)) > 3) is (may_burst(engine, mode) and not is_immediate)
        trace = finished([event for step in steps for event in step]).trace
        assert trace is not None
        traces.append(trace)
    engine.close()
    alone, together = traces
    assert len(together.steps) == 12
    assert together.num_unrecorded_steps == alone.num_unrecorded_steps == NUM_TOKENS - 1 - 12
    for one, other in zip(alone.steps, together.steps, strict=True):
        for name in ("kind", "token_ids", "actions", "scores", "cost_spent", "cost"):
            assert getattr(one, name) == getattr(other, name)
    for before, step in pairwise(together.steps):
        assert step.start_unix_ns >= before.start_unix_ns + before.duration_ns
    for step in together.steps:
        starts, ends = unpack_uint32(step.layer_starts), unpack_uint32(step.layer_ends)
        times = [time for pair in zip(starts, ends, strict=True) for time in pair]
        assert times == sorted(times)
        assert 0 < times[-1] <= step.duration_ns


@pytest.mark.parametrize(
    ("milliseconds", "num_left", "asked"),
    [(1, 90, [20]), (1, 5, [5]), (0.1, 90, [MOST_IN_BURST]), (10, 90, [2]), (11, 90, []), (1, 1, [])],
)
def test_a_burst_has_as_many_tokens_as_its_time_holds(milliseconds: float, num_left: int, asked: list[int]) -> None:
    """Of those left, going by the time that the last one took."""
    counts: list[int] = []

    def run(plan: object, token_ids: object, batch: object, limit: Limit) -> None:
        counts.append(limit.count)

    rows = SimpleNamespace(may_burst=True, token_seconds=milliseconds / 1e3, plan=None, batch=None)
    sampler = SimpleNamespace(is_plain_draw=False)
    sequence = SimpleNamespace(
        num_tokens_left=num_left, guesses=None, sampler=sampler, last_token_id=1, end_token_ids=()
    )
    assert Bursts(cast(Any, SimpleNamespace(run=run)), 0.020001).decode(cast(Any, rows), cast(Any, sequence)) is None
    assert counts == asked


def test_no_milliseconds_mean_no_bursts(model: SmallModel) -> None:
    engine = engine_of(model, burst_milliseconds=0)
    engine.submit(request())
    assert max(map(len, tokens_of_steps(engine))) == 1
    engine.close()
    with pytest.raises(ConfigError, match="burst_milliseconds"):
        EngineConfig(burst_milliseconds=21)
