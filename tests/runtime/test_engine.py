"""Continuous batching: slots, chunks, endings, and tokens that do not depend on what runs beside them."""

from dataclasses import replace

import pytest

from dash_runtime.actions import Action
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import SequenceFinished, SlotGranted, TokenProduced
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.support import ALL_ACTIONS, drain, finished, run, some_affine, some_costs, some_plans, tokens

pytestmark = pytest.mark.alone

ADAPTIVE = SkipOptions(Mode.ADAPTIVE, compute_budget=0.6)


def make_engine(decoder: Decoder, eos: frozenset[int] = frozenset(), **options: int) -> Engine:
    config = EngineConfig(**options)  # type: ignore[arg-type]
    catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, some_affine(decoder), (), 0.8, plans=some_plans())
    return assemble_engine(decoder, catalog, config, 512, eos)


def request(
    name: str, prompt: list[int] | None = None, max_new_tokens: int = 8, **options: object
) -> GenerationRequest:
    stopping = StoppingParameters(max_new_tokens)
    made = GenerationRequest(name, prompt or [1, 2, 3], stopping)
    return replace(made, **options)  # type: ignore[arg-type]


def mixed_requests() -> list[GenerationRequest]:
    sampled = SamplingParameters(temperature=1.0, top_p=0.95, seed=9, repetition_penalty=1.1)
    return [
        request("full", list(range(1, 40)), 12),
        request("adaptive", [5, 6], 20, skip=ADAPTIVE),
        request("adaptive-sampled", list(range(50, 90)), 15, skip=ADAPTIVE, sampling=sampled),
        request("int4", [7], 9, skip=SkipOptions(Mode.FIXED, fixed_action=Action.INT4)),
        request("skip", [8, 9], 9, skip=SkipOptions(Mode.FIXED, fixed_action=Action.SKIP)),
        request("another-budget", [5, 6], 20, skip=replace(ADAPTIVE, compute_budget=0.8)),
    ]


def test_a_requests_tokens_do_not_depend_on_its_neighbours(decoder: Decoder) -> None:
    for options in ({}, {"num_slots": 2}, {"prefill_chunk_tokens": 7}, {"cache_tokens": 64}):
        together = run(make_engine(decoder, **options), *mixed_requests())
        alone = {
            own.request_id: tokens(run(make_engine(decoder, **options), own)[own.request_id])
            for own in mixed_requests()
        }
        assert {name: tokens(events) for name, events in together.items()} == alone, options


def test_events_come_in_order_and_count_every_token(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    engine.submit(request("a", max_new_tokens=5, skip=ADAPTIVE, return_decisions=True))
    events = engine.step()
    log = engine._running["a"].log
    events += drain(engine)["a"]
    assert [type(event) for event in events] == [SlotGranted, *[TokenProduced] * 5, SequenceFinished]
    depth = finished(events).depth
    assert depth.num_decode_tokens == 4
    assert sum(depth.action_counts.values()) == 4 * 6
    plans = b"".join(event.plan for event in events if isinstance(event, TokenProduced))
    assert plans[:6] == bytes([Action.FULL] * 6)
    assert bytes(log.plans) == plans
    for action in Action:
        assert depth.action_counts[action] == plans[6:].count(action)


def test_full_depth_costs_one_and_an_adaptive_request_about_its_budget(decoder: Decoder) -> None:
    events = run(
        make_engine(decoder), request("full", max_new_tokens=50), request("a", max_new_tokens=100, skip=ADAPTIVE)
    )
    assert finished(events["full"]).depth.mean_cost == pytest.approx(1)
    assert 0.5 < finished(events["a"]).depth.mean_cost <= 0.6


def test_decisions_are_returned_only_when_asked_for(decoder: Decoder) -> None:
    events = run(make_engine(decoder), request("a"))["a"]
    assert all(event.plan == b"" for event in events if isinstance(event, TokenProduced))


def test_a_sequence_ends_at_an_end_of_sequence_token_unless_told_to_go_on(decoder: Decoder) -> None:
    produced = tokens(run(make_engine(decoder), request("a", max_new_tokens=10))["a"])
    end = produced[3]
    length = produced.index(end) + 1
    engine = make_engine(decoder, frozenset((end,)))
    events = run(engine, request("a", max_new_tokens=10))["a"]
    assert tokens(events) == produced[:length]
    assert finished(events).reason == "end_of_sequence"
    ignoring = request("b", stopping=StoppingParameters(10, ignore_eos=True))
    assert tokens(run(engine, ignoring)["b"]) == produced
    stopping = request("c", stopping=StoppingParameters(10, frozenset((end,)), ignore_eos=True))
    events = run(engine, stopping)["c"]
    assert tokens(events) == produced[:length]
    assert finished(events).reason == "stop_token"


def test_one_token_is_made_by_the_prefill_alone(decoder: Decoder) -> None:
    events = run(make_engine(decoder), request("a", max_new_tokens=1, skip=ADAPTIVE))["a"]
    assert len(tokens(events)) == 1
    assert finished(events).depth.num_decode_tokens == 0
    assert finished(events).reason == "length"


def test_the_context_can_be_filled_to_its_last_position(decoder: Decoder) -> None:
    engine = make_engine(decoder, cache_tokens=512)
    events = run(engine, request("a", list(range(200)) * 2 + list(range(111)), 1))["a"]
    assert finished(events).reason == "length"


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_cancelled_request_leaves_nothing_behind_wherever_it_is(decoder: Decoder, steps: int) -> None:
    engine = make_engine(decoder, num_slots=1, prefill_chunk_tokens=4)
    engine.submit(request("cancelled", list(range(12)), 30))
    engine.submit(request("next"))
    for _ in range(steps):
        engine.step()
    engine.cancel("cancelled")
    engine.cancel("unknown")
    events = drain(engine)
    assert set(events) == {"next"}
    assert finished(events["next"]).num_output_tokens == 8
    assert engine.num_reserved_cache_tokens == 0


@pytest.mark.parametrize(
    ("state", "steps"), [("queued", 0), ("queued", 2), ("prefill", 1), ("prefill", 3), ("decode", 6)]
)
def test_cancelling_frees_everything_at_once_in_every_state(decoder: Decoder, state: str, steps: int) -> None:
    engine = make_engine(decoder, num_slots=1, prefill_chunk_tokens=4)
    ahead = [request("ahead", max_new_tokens=20)] if state == "queued" and steps else []
    for own in (*ahead, request("cancelled", list(range(18)), 30)):
        engine.submit(own)
    events = [event for _ in range(steps) for event in engine.step() if event.request_id == "cancelled"]
    assert [type(event) for event in events] == {
        "queued": [],
        "prefill": [SlotGranted],
        "decode": [SlotGranted, TokenProduced, TokenProduced],
    }[state]
    engine.cancel("cancelled")
    for own in ahead:
        engine.cancel(own.request_id)
    assert engine.num_reserved_cache_tokens == 0
    assert not engine.has_work
    assert engine.step() == []


def test_a_stopped_request_finishes_with_what_it_has(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    engine.submit(request("a", max_new_tokens=50))
    for _ in range(4):
        engine.step()
    (event,) = engine.stop("a")
    assert isinstance(event, SequenceFinished)
    assert event.reason == "stop_string"
    assert event.num_output_tokens == 4
    assert engine.stop("a") == []
    assert not engine.has_work
    assert engine.num_reserved_cache_tokens == 0


def test_requests_wait_for_slots_and_for_cache_first_come_first_served(decoder: Decoder) -> None:
    engine = make_engine(decoder, num_slots=2, cache_tokens=40)
    for own in (
        request("a", max_new_tokens=10),
        request("wide", max_new_tokens=30),
        request("narrow", max_new_tokens=2),
    ):
        engine.submit(own)
    granted = [event.request_id for event in engine.step() if isinstance(event, SlotGranted)]
    assert granted == ["a"]
    order = [name for name, events in drain(engine).items() if isinstance(events[0], SlotGranted)]
    assert order == ["wide", "narrow"]


def test_a_long_prompt_does_not_hold_up_the_others_next_token(decoder: Decoder) -> None:
    engine = make_engine(decoder, prefill_chunk_tokens=8)
    engine.submit(request("short", max_new_tokens=30))
    engine.step()
    engine.submit(request("long", list(range(80)), 2))
    for _ in range(9):
        assert [type(event) for event in engine.step() if event.request_id == "short"] == [TokenProduced]


def test_logprobs_are_returned_for_every_token_including_the_first(decoder: Decoder) -> None:
    events = run(make_engine(decoder), request("a", logprobs=3, max_new_tokens=4))["a"]
    for event in events:
        if isinstance(event, TokenProduced):
            assert event.logprobs is not None
            assert event.logprobs.top[0] == (event.token_id, event.logprobs.chosen)
            assert len(event.logprobs.top) == 3


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request("a", [1, 260]), "token_ids[1]"),
        (request("a", [-1]), "token_ids[0]"),
        (request("a", list(range(200)) * 3), "prompt"),
        (request("a", [1], 512), "stopping.max_new_tokens"),
        (request("a", stopping=StoppingParameters(1, frozenset((999,)))), "stopping.stop_token_ids"),
        (request("a", sampling=SamplingParameters(logit_bias={999: 1.0})), "sampling.logit_bias"),
        (request("a", skip=SkipOptions(Mode.ADAPTIVE, policy_name="no such")), "skip.policy_name"),
        (request("a", skip=SkipOptions(Mode.ADAPTIVE, compute_budget=0.01)), "skip.compute_budget"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_field_and_the_others_go_on(
    decoder: Decoder, bad: GenerationRequest, field: str
) -> None:
    engine = make_engine(decoder)
    engine.submit(request("good"))
    with pytest.raises(InvalidRequest) as refusal:
        engine.submit(bad)
    assert refusal.value.field == field
    assert list(drain(engine)) == ["good"]


def test_a_long_prompt_reports_progress_after_every_layer(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    reports: list[int] = []
    engine.on_progress = lambda: reports.append(1)
    engine.submit(request("one", list(range(1, 100)), 2))
    engine.step()
    assert len(reports) > decoder.num_layers
