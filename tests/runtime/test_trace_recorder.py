"""The engine's record of a request: every decision of its first steps, with times that fit together."""

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.decision_trace import DecisionTrace, StepKind, TraceStep, pack_uint32, unpack_float32, unpack_uint32
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices.step_timer import StepTimer
from dash_runtime.engine.decider import DecidedBlock
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.trace_recorder import TraceRecorder
from dash_runtime.events import EngineEvent, SequenceCancelled, SequenceFinished, SlotGranted, TokenProduced
from dash_runtime.layers.compensation import Identity
from dash_runtime.passes import OnePass, PassResult
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.support import ALL_ACTIONS, drain, finished, some_costs, some_policy, tokens

PINNED = {0: Action.FULL, 5: Action.FULL}
ADAPTIVE = SkipOptions(Mode.ADAPTIVE, compute_budget=0.7)
EXACT = SkipOptions(Mode.EXACT, compute_budget=0.7)
NEARLY_FREE = {1: 0.1, 3: 0.1, 7: 0.1}


def make_engine(decoder: Decoder, record_steps: int = 64) -> Engine:
    """Returns an engine with a policy that has decision blocks of three layers and of one."""
    spec = PlanSpec(ALL_ACTIONS, pinned=PINNED, lookahead=1, block_size=3, head=Action.FULL, costs=some_costs())
    policy = some_policy(spec, decoder.config.hidden_size, (0.5, 1.0, 0.1), (1.0, 0.0, 0.01))
    config = EngineConfig(record_steps=record_steps, group_planner=False)
    catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, Identity(), (policy,), 0.7, NEARLY_FREE, least_drafting_gain=0.1)
    return assemble_engine(decoder, catalog, config, 512, frozenset())


def request(name: str, skip: SkipOptions, max_new_tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(name, [1, 2, 3], StoppingParameters(max_new_tokens), skip=skip, return_decisions=True)


def recorded_of(event: SequenceFinished | SequenceCancelled) -> DecisionTrace:
    assert event.trace is not None
    return event.trace


def check_times(recorded: DecisionTrace, step: TraceStep) -> None:
    starts, ends = unpack_uint32(step.layer_starts), unpack_uint32(step.layer_ends)
    assert recorded.first_token_unix_ns is not None
    assert recorded.granted_unix_ns <= recorded.first_token_unix_ns <= step.start_unix_ns
    assert step.start_unix_ns + step.duration_ns <= recorded.ended_unix_ns
    assert all(start <= end for start, end in zip(starts, ends, strict=True))
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert ends[-1] <= step.duration_ns


def test_every_layer_that_is_not_pinned_has_a_decision_with_its_scores_and_times(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    engine.submit(request("a", ADAPTIVE))
    events = drain(engine)["a"]
    engine.close()
    recorded = recorded_of(finished(events))
    assert (recorded.policy, recorded.compute_budget, recorded.pinned_layers) == ("mine", 0.7, [0, 5])
    assert recorded.score_actions == list(ALL_ACTIONS)
    assert recorded.first_token_id == tokens(events)[0]
    assert [step.token_ids for step in recorded.steps] == [[token_id] for token_id in tokens(events)[1:]]
    plans = [event.plan for event in events if isinstance(event, TokenProduced)]
    assert [step.actions for step in recorded.steps] == plans[1:]
    exposed_ns = 0
    for step in recorded.steps:
        check_times(recorded, step)
        layer_starts = unpack_uint32(step.layer_starts)
        starts, ends = unpack_uint32(step.decision_starts), unpack_uint32(step.decision_ends)
        assert [layer for layer in range(6) if ends[layer]] == [1, 2, 3, 4]
        assert all(starts[layer] <= ends[layer] <= layer_starts[layer] for layer in (1, 2, 3, 4))
        assert starts[1] == starts[2] == starts[3] < starts[4]  # a decision block is one evaluation
        scores = unpack_float32(step.scores)
        for layer in (1, 2, 3, 4):
            own = scores[layer * 5 : layer * 5 + 5]
            assert ALL_ACTIONS[max(range(5), key=own.__getitem__)] == step.actions[layer]
        exposed = unpack_uint32(step.exposed)
        assert not exposed[2]
        assert not exposed[3]
        exposed_ns += sum(exposed)
        costs = some_costs().layer
        spent = [sum(costs[Action(action)] for action in step.actions[:layer]) for layer in range(6)]
        assert list(unpack_float32(step.cost_spent)) == pytest.approx(spent)
    assert exposed_ns == finished(events).depth.exposed_ns


def test_rows_of_a_batch_keep_their_own_scores(decoder: Decoder) -> None:
    skips = {"first": ADAPTIVE, "full": SkipOptions(), "second": replace(ADAPTIVE, compute_budget=0.9)}

    def scores(*names: str) -> dict[str, list[float]]:
        engine = make_engine(decoder)
        for name in names:
            engine.submit(replace(request(name, skips[name]), prompt_token_ids=[len(name), 8]))
        steps = {name: recorded_of(finished(events)).steps for name, events in drain(engine).items()}
        return {name: [score for step in own for score in unpack_float32(step.scores)] for name, own in steps.items()}

    together = scores(*skips)
    assert together["full"] == []
    for name in ("first", "second"):  # up to the rounding of a product of several rows
        assert together[name] == pytest.approx(scores(name)[name], abs=1e-3)


def test_steps_alone_whose_passes_decide_and_steps_in_a_batch_are_recorded_together(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    recorder = TraceRecorder(engine._catalog.assign(ADAPTIVE), 64)
    recorder.add_first_token(5)
    plan, times = bytes([Action.FULL] * 6), array("q", range(100, 220, 10))
    ticket: Any = SimpleNamespace(started_ns=103, ended_ns=107, exposed_ns=2)
    scores = torch.arange(40.0).view(2, 4, 5)
    alone = array("f", [layer if 0 < layer < 5 else 0 for layer in range(6) for _ in range(5)]).tobytes()
    together = [DecidedBlock((1, 2, 3), ticket, scores[:, :3]), DecidedBlock((4,), ticket, scores[:, 3:])]
    for in_pass, blocks, rows in ((alone, [], [0]), (None, together, [0, 1]), (alone, [], [0])):
        decider: Any = SimpleNamespace(rows=rows, blocks=blocks)
        record = OnePass(StepTimer(times), 90, {rows[-1]: in_pass}.get)
        result = PassResult([7] * len(rows), [plan] * len(rows), record, torch.zeros(len(rows), 4))
        recorder.add_pass(StepKind.DECODE, 7, 0.5, result, rows[-1], decider)
    recorded = recorder.packed("a")
    assert recorded is not None
    first, second, third = recorded.steps
    assert list(unpack_float32(first.scores)) == [0.0] * 5 + [1.0] * 5 + [2.0] * 5 + [3.0] * 5 + [4.0] * 5 + [0.0] * 5
    assert list(unpack_float32(second.scores)) == [0.0] * 5 + list(range(20, 40)) + [0.0] * 5
    assert list(unpack_uint32(first.decision_starts)) == [0, 10, 30, 50, 70, 0]
    assert list(unpack_uint32(second.decision_starts)) == [0, 13, 13, 13, 13, 0]
    assert (list(unpack_uint32(first.exposed)), list(unpack_uint32(second.exposed))) == ([0] * 6, [0, 2, 0, 0, 2, 0])
    assert third.scores == first.scores


def test_full_depth_has_layers_and_no_decisions(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    engine.submit(request("a", SkipOptions()))
    recorded = recorded_of(finished(drain(engine)["a"]))
    assert recorded.price is None
    for step in recorded.steps:
        check_times(recorded, step)
        assert not any(unpack_uint32(step.decision_ends))
        assert step.actions == bytes([Action.FULL] * 6)


def test_exact_records_drafts_and_what_their_verifications_accepted(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    engine.submit(request("a", EXACT, 40))
    events = drain(engine)["a"]
    recorded = recorded_of(finished(events))
    output = [recorded.first_token_id]
    drafted: list[int] = []
    num_from_text = 0
    for step in recorded.steps:
        if step.kind is StepKind.DRAFT:
            drafted += step.token_ids
            assert len(step.actions) == 6
            continue
        if step.kind is StepKind.VERIFICATION:
            assert step.accepted_token_count is not None
            assert step.text_token_count is not None
            assert step.text_token_count + len(drafted) > 0
            assert step.accepted_token_count <= step.text_token_count + len(drafted)
            accepted = drafted[: step.accepted_token_count]
            assert step.token_ids[: len(accepted)] == accepted
            num_from_text += step.text_token_count
            drafted = []
        output += step.token_ids
    assert output == tokens(events)
    speculation = finished(events).speculation
    assert speculation is not None
    kinds = [step.kind for step in recorded.steps]
    assert num_from_text == speculation.num_drafted_from_text > 0
    assert kinds.count(StepKind.DRAFT) == speculation.num_drafted - num_from_text > 0
    assert kinds.count(StepKind.VERIFICATION) == speculation.num_verifications
    assert sum(step.accepted_token_count or 0 for step in recorded.steps) == speculation.num_accepted


def test_only_the_first_steps_are_recorded_and_the_others_counted(decoder: Decoder) -> None:
    engine = make_engine(decoder, record_steps=3)
    engine.submit(request("a", ADAPTIVE, 10))
    recorded = recorded_of(finished(drain(engine)["a"]))
    assert (len(recorded.steps), recorded.num_unrecorded_steps) == (3, 6)


def test_nothing_is_recorded_unless_asked_for(decoder: Decoder) -> None:
    engine = make_engine(decoder, record_steps=0)
    engine.submit(request("a", ADAPTIVE))
    assert finished(drain(engine)["a"]).trace is None


def test_a_cancelled_request_leaves_what_was_recorded(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    engine.submit(request("a", ADAPTIVE, 50))
    assert engine.cancel("unknown") == []
    for _ in range(4):
        engine.step()
    (event,) = engine.cancel("a")
    assert isinstance(event, SequenceCancelled)
    assert len(recorded_of(event).steps) == 3
    assert engine.num_reserved_cache_tokens == 0


def test_events_of_every_mode_survive_the_socket(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    for name, skip in {"adaptive": ADAPTIVE, "exact": EXACT, "full": SkipOptions()}.items():
        engine.submit(replace(request(name, skip, 20), logprobs=2))
    events = engine.cancel("exact") + engine.step()
    engine.submit(request("again", EXACT, 20))
    events += engine.step() + engine.cancel("adaptive")
    while engine.has_work:
        events += engine.step()
    assert {type(event) for event in events} == {SlotGranted, TokenProduced, SequenceFinished, SequenceCancelled}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(events), type=list[EngineEvent]) == events


def test_numbers_that_do_not_fit_are_packed_as_the_nearest_that_do() -> None:
    assert list(unpack_uint32(pack_uint32([-5, 7, 1 << 40]))) == [0, 7, 0xFFFF_FFFF]
    with pytest.raises(ValueError, match="bytes"):
        unpack_uint32(b"abc")
