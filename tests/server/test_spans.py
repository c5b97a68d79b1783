"""Spans of made-up decision traces, without a server."""

import random
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, Mode, SamplingParameters, SkipOptions, StoppingParameters
from dash_runtime.decision_trace import DecisionTrace, StepKind, TraceStep, pack_float32, pack_uint32
from dash_server.auth import Caller
from dash_server.from_pb import PreparedRequest
from dash_server.request_record import RequestRecord
from dash_server.telemetry.call_spans import CallSpans
from dash_server.telemetry.pending_traces import PendingTraces
from dash_server.telemetry.token_spans import SpanOptions
from dash_server.telemetry.trace_sampling import SamplingRule, caller_span, new_trace_id

MILLISECOND = 1_000_000
START = 1_764_000_000_000 * MILLISECOND
NUM_LAYERS, PINNED = 4, [0, 3]


SERVER, WORKER = (Resource({"service.name": name}) for name in ("dash-llm", "dash-llm-worker"))


def step(kind: StepKind, place: int, **changes: Any) -> TraceStep:
    """Returns a step of one millisecond, number `place`, with decisions for its two free layers."""
    fields: dict[str, Any] = {
        "kind": kind,
        "token_ids": [place],
        "start_unix_ns": START + (place + 2) * MILLISECOND,
        "duration_ns": MILLISECOND,
        "actions": bytes([Action.FULL, Action.SKIP, Action.INT8, Action.FULL]),
        "layer_starts": pack_uint32([100, 200, 300, 400]),
        "layer_ends": pack_uint32([200, 300, 400, 500]),
        "decision_starts": pack_uint32([0, 150, 250, 0]),
        "decision_ends": pack_uint32([0, 190, 290, 0]),
        "exposed": pack_uint32([0, 0, 9, 0]),
        "scores": pack_float32([0, 0, 1, 0, 1, 0, 0, 0]),
        "cost_spent": pack_float32([0, 0.25, 0.375, 0.5]),
        "cost": 0.625,
    }
    return TraceStep(**(fields | changes))


def verification(place: int, token_ids: list[int], num_accepted: int, num_from_text: int = 0) -> TraceStep:
    return TraceStep(
        StepKind.VERIFICATION,
        token_ids,
        START + (place + 2) * MILLISECOND,
        MILLISECOND,
        cost=1.5,
        accepted_token_count=num_accepted,
        text_token_count=num_from_text,
    )


def drafts(first: int, number: int) -> list[TraceStep]:
    return [step(StepKind.DRAFT, place) for place in range(first, first + number)]


def recorded(steps: list[TraceStep], **changes: Any) -> DecisionTrace:
    fields: dict[str, Any] = {
        "request_id": "r",
        "policy": "p",
        "compute_budget": 0.5,
        "price": 0.75,
        "num_layers": NUM_LAYERS,
        "pinned_layers": PINNED,
        "score_actions": [Action.SKIP, Action.INT8],
        "granted_unix_ns": START + MILLISECOND,
        "ended_unix_ns": START + 90 * MILLISECOND,
        "first_token_id": 99,
        "first_token_unix_ns": START + 2 * MILLISECOND,
        "steps": steps,
    }
    return DecisionTrace(**(fields | changes))


def record(mode: Mode = Mode.ADAPTIVE, **changes: Any) -> RequestRecord:
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        stopping=StoppingParameters(max_new_tokens=9),
        sampling=SamplingParameters(seed=2**64 - 1),
        skip=SkipOptions(mode, 0.5),
    )
    fields: dict[str, Any] = {
        "request_id": "r",
        "method": "dash_api.v1.GenerationService/Generate",
        "seconds_left": None,
        "trace_id": new_trace_id(),
        "caller": Caller("somebody"),
        "model": "m",
        "prepared": PreparedRequest(request, (), frozenset()),
        "started_unix_ns": START,
        "ended_unix_ns": START + 100 * MILLISECOND,
    }
    return RequestRecord(**(fields | changes))


def spans_of(said: DecisionTrace | None, call: RequestRecord | None = None, **options: Any) -> list[ReadableSpan]:
    source = CallSpans(call or record(), said, SpanOptions(**options), SERVER, WORKER)
    spans = list(source)
    assert len(spans) <= source.num_spans
    check(spans)
    return spans


def check(spans: list[ReadableSpan]) -> None:
    """Checks for one root, and parents that come before their children and surround them."""
    known: dict[int, ReadableSpan] = {}
    for span in spans:
        assert span.context is not None
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
        if known:
            assert span.parent is not None
            parent = known[span.parent.span_id]
            assert parent.start_time <= span.start_time  # type: ignore[operator]
            assert span.end_time <= parent.end_time  # type: ignore[operator]
        known[span.context.span_id] = span
    assert len(known) == len(spans)


def tree(spans: list[ReadableSpan]) -> list[str]:
    """Returns each span's parent and name, below the generation."""
    names = {span.context.span_id: span.name for span in spans if span.context is not None}
    lines: list[str] = []
    for span in spans[2:]:
        assert span.parent is not None
        parent = names[span.parent.span_id]
        lines.append(span.name if parent.endswith(" m") else f"{parent} > {span.name}")
    return lines


def attributes(spans: list[ReadableSpan], name: str) -> list[dict[str, Any]]:
    return [dict(span.attributes or {}) for span in spans if span.name == name]


DECISIONS = ["skip layer 1", "int8 layer 2"]
DECIDED = [f"token > {decision}" for decision in DECISIONS]
REJECTED = ["draft > rejected token", *(f"rejected token > {decision}" for decision in DECISIONS)]


def test_rejected_drafts_hang_under_their_draft_and_accepted_ones_are_tokens() -> None:
    steps = [*drafts(0, 3), verification(3, [0, 50], 1), *drafts(4, 2), verification(6, [4, 5, 51], 2)]
    spans = spans_of(recorded(steps), record(Mode.EXACT))
    assert tree(spans) == [
        "token",
        *("draft", "token", *DECIDED, *REJECTED, *REJECTED, "draft > verification", "token"),
        *("draft", "token", *DECIDED, "token", *DECIDED, "draft > verification", "token"),
    ]
    assert [token["dash.token.index"] for token in attributes(spans, "token")] == list(range(6))
    counts = [(draft["dash.draft.drafted"], draft["dash.draft.accepted"]) for draft in attributes(spans, "draft")]
    assert counts == [(3, 1), (2, 2)]
    tokens = [span for span in spans if span.name == "token"]
    assert tokens[1].start_time == START + 2 * MILLISECOND, "an accepted token has its draft step's times"
    assert tokens[2].start_time == START + 5 * MILLISECOND, "full depth's own token has the verification's"


def test_a_draft_that_ends_the_output_early_is_put_out_only_so_far() -> None:
    spans = spans_of(recorded([*drafts(0, 3), verification(3, [0], 2)]))
    drafted = ["draft > drafted token", *(f"drafted token > {decision}" for decision in DECISIONS)]
    assert tree(spans) == ["token", "draft", "token", *DECIDED, *drafted, *REJECTED, "draft > verification"]


def test_a_draft_from_the_text_has_a_verification_and_no_steps() -> None:
    spans = spans_of(recorded([verification(3, [0, 1, 2], 2, num_from_text=2)]))
    assert tree(spans) == ["token", "draft", "draft > verification", "token", "token", "token"]
    (draft,) = attributes(spans, "draft")
    counts = {"dash.draft.drafted": 2, "dash.draft.from_text": 2, "dash.draft.accepted": 2}
    assert draft == {"dash.draft.verified": True} | counts


def test_a_draft_that_was_never_verified_says_so() -> None:
    spans = spans_of(recorded([step(StepKind.DECODE, 0), *drafts(1, 1)]))
    drafted = ["draft > drafted token", *(f"drafted token > {decision}" for decision in DECISIONS)]
    assert tree(spans)[4:] == ["draft", *drafted]
    (draft,) = attributes(spans, "draft")
    assert draft == {"dash.draft.verified": False, "dash.draft.drafted": 1}


def test_decisions_have_scores_and_what_the_batch_made_of_them() -> None:
    spans = spans_of(recorded([step(StepKind.DECODE, 0)]))
    (first,), (second,) = (attributes(spans, name) for name in DECISIONS)
    assert first == {
        "dash.layer": 1,
        "dash.action": "skip",
        "dash.scores.skip": 1.0,
        "dash.scores.int8": 0.0,
        "dash.exposed_ns": 0,
        "dash.cost_spent": 0.25,
        "dash.price_of_compute": 0.75,
    }
    assert (second["dash.action"], second["dash.raised_from"], second["dash.exposed_ns"]) == ("int8", "skip", 9)


def test_a_policy_without_scores_has_none_in_its_decisions() -> None:
    unscored = recorded([step(StepKind.DECODE, 0, scores=b"")], score_actions=[], price=None)
    assert attributes(spans_of(unscored), "skip layer 1")[0].keys() == {
        "dash.layer",
        "dash.action",
        "dash.exposed_ns",
        "dash.cost_spent",
    }


def test_layers_stand_beside_decisions() -> None:
    spans = spans_of(recorded([step(StepKind.DECODE, 0)]), has_layers=True)
    names = [f"layer {layer}" for layer in range(NUM_LAYERS)]
    assert tree(spans)[2:] == [*DECIDED, *(f"token > {name}" for name in names)]
    assert [attributes(spans, name)[0]["dash.action"] for name in names] == ["full", "skip", "int8", "full"]


def test_a_token_says_where_it_stands_what_it_cost_and_how_many_layers_ran_each_action() -> None:
    spans = spans_of(recorded([step(StepKind.DECODE, 0), *drafts(1, 1), verification(2, [50], 0)]))
    tokens = attributes(spans, "token")
    assert [token["dash.token.position"] for token in tokens] == [3, 4, 5], "after a prompt of three tokens"
    ran = {"dash.cost": 0.625, "dash.layers.skip": 1, "dash.layers.int8": 1, "dash.layers.full": 2}
    assert tokens[1] == ran | {"dash.token.index": 1, "dash.token.position": 4}
    assert attributes(spans, "rejected token") == [ran]
    assert attributes(spans, "verification") == [{"dash.verification.tokens": 1, "dash.cost": 1.5}]
    assert "dash.cost" not in tokens[0], "the prefill's"


def test_what_the_worker_did_is_of_a_service_of_its_own() -> None:
    spans = spans_of(recorded([step(StepKind.DECODE, 0)]))
    assert [span.resource for span in spans] == [SERVER] * 2 + [WORKER] * (len(spans) - 2)


def test_the_slot_was_granted_when_the_worker_says_so() -> None:
    late = record(granted_unix_ns=START + 60 * MILLISECOND)
    assert [event.timestamp for event in spans_of(recorded([]), late)[1].events] == [START + MILLISECOND]
    assert [event.timestamp for event in spans_of(None, late)[1].events] == [START + 60 * MILLISECOND]


def test_token_ids_are_content() -> None:
    assert "dash.token.id" not in str([span.attributes for span in spans_of(recorded(drafts(0, 2)))])
    assert [token["dash.token.id"] for token in attributes(spans_of(recorded([]), has_content=True), "token")] == [99]


def test_a_seed_that_otlp_cannot_hold_is_left_out() -> None:
    assert "gen_ai.request.seed" not in (spans_of(None)[1].attributes or {})


def test_a_trace_has_at_most_so_many_spans_and_counts_what_it_leaves_out() -> None:
    steps = [step(StepKind.DECODE, place) for place in range(4000)]
    spans = spans_of(recorded(steps, num_unrecorded_steps=7))
    assert 8_990 < len(spans) <= 9_002
    untraced = (spans[1].attributes or {})["dash.untraced_steps"]
    assert untraced == 4007 - (len(attributes(spans, "token")) - 1)


def test_a_draft_that_does_not_fit_is_left_out_whole() -> None:
    spans = spans_of(recorded([*drafts(0, 3), verification(3, [0, 50], 1)]), max_spans=8)
    assert tree(spans) == ["token"]
    assert (spans[1].attributes or {})["dash.untraced_steps"] == 4


def test_a_call_that_was_refused_before_it_was_read_has_one_span() -> None:
    refused = record(prepared=None, code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_REQUEST")
    (span,) = spans_of(None, refused)
    assert (span.attributes or {})["rpc.response.status_code"] == "INVALID_ARGUMENT"


@given(shift=st.integers(-200, 200), scale=st.floats(0, 40), seed=st.integers(0, 99))
def test_clocks_that_disagree_make_no_span_leave_its_parent(shift: int, scale: float, seed: int) -> None:
    generator = random.Random(seed)
    steps = [
        step(
            generator.choice([StepKind.DECODE, StepKind.DRAFT]),
            place,
            start_unix_ns=START + shift * MILLISECOND + generator.randrange(50) * MILLISECOND,
            duration_ns=round(scale * MILLISECOND),
            decision_ends=pack_uint32([0, generator.randrange(1, 9 * MILLISECOND), 1, 0]),
        )
        for place in range(6)
    ]
    spans_of(recorded([*steps, verification(shift, [1], 1)]), has_layers=True)


def test_the_sampling_ratio_is_kept_and_follows_the_trace_id() -> None:
    rule = SamplingRule(0.25, None)
    sampled = [rule.is_sampled(record()) for _ in range(4000)]
    assert 850 < sum(sampled) < 1150
    one = record()
    assert len({rule.is_sampled(record(trace_id=one.trace_id)) for _ in range(9)}) == 1
    assert all(SamplingRule(1, None).is_sampled(record()) for _ in range(99))
    assert not any(SamplingRule(0, None).is_sampled(record()) for _ in range(99))


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_faults_of_the_server_are_always_traced_and_others_never_by_themselves(code: grpc.StatusCode) -> None:
    faults = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
    assert SamplingRule(0, None).is_sampled(record(code=code)) == (code.name in faults)


def test_who_may_not_call_cannot_ask_for_a_trace() -> None:
    metadata = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    stranger = record(caller=None, caller_span=caller_span(metadata), code=grpc.StatusCode.UNAUTHENTICATED)
    assert not SamplingRule(1, None).is_sampled(stranger)


@pytest.mark.parametrize(("traceparent", "is_sampled"), [("00", False), ("01", True), ("03", True), ("fe", False)])
def test_the_callers_flag_is_the_lowest_bit(traceparent: str, is_sampled: bool) -> None:
    span = caller_span({"traceparent": f"00-{'1' * 32}-{'2' * 16}-{traceparent}", "tracestate": "a=b"})
    assert span is not None
    assert span.trace_flags.sampled == is_sampled
    assert span.trace_state.get("a") == "b"


def test_headers_that_are_too_long_are_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    traceparent = f"00-{'1' * 32}-{'2' * 16}-01"
    span = caller_span({"traceparent": traceparent, "tracestate": f"a={'b' * 511}"})
    assert span is not None
    assert not span.trace_state
    assert caller_span({"traceparent": f"cc{traceparent[2:]}-{'x' * 500}"}) is None
    assert not caplog.records


@given(st.text(max_size=80), st.text(max_size=600))
def test_no_header_is_too_strange_to_be_read(traceparent: str, tracestate: str) -> None:
    assert caller_span({"traceparent": traceparent, "tracestate": tracestate}) is None
    caller_span({"traceparent": f"00-{'1' * 32}-{'2' * 16}-00", "tracestate": tracestate})


async def test_a_recording_is_joined_with_its_call_whichever_comes_first() -> None:
    complete: list[tuple[str, bool]] = []
    calls = PendingTraces(
        lambda *_: None, lambda record, recorded: complete.append((record.request_id, bool(recorded)))
    )
    before, after, never = (record(request_id=name, granted=object()) for name in ("before", "after", "never"))
    for call in (before, after, never):
        calls.begin(call)
    calls.add(recorded([], request_id="before"))
    for call in (before, after, never):
        calls.end(call)
    calls.add(recorded([], request_id="after"))
    calls.add(recorded([], request_id="of no call"))
    assert complete == [("before", True), ("after", True)]
    calls.close()
    assert complete[2:] == [("never", False)]
