"""Traces of a real server with the fake worker, as a real collector receives them."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from dash_api.v1 import common_pb2, generation_pb2
from tests.server.otlp_receiver import OtlpReceiver, attributes_of, otlp_receiver
from tests.server.server_harness import RunningServer, fake_model, generation_request, running_server

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"
TRACED = generation_pb2.OutputOptions(trace=True)
CANARY = "kumquat"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    """A collector that servers find by the standard variable."""
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.endpoint)
        yield receiver


async def stream(server: RunningServer, traceparent: str | None = None, **parameters: object) -> list[int]:
    """Returns the token ids of a whole stream."""
    request = generation_pb2.StreamGenerateRequest(parameters=generation_request(**parameters).parameters)
    metadata = () if traceparent is None else (("traceparent", traceparent),)
    messages = [message async for message in server.generation.StreamGenerate(request, metadata=metadata)]
    return [token_id for message in messages for token_id in message.delta.token_ids]


async def test_attributes_follow_the_conventions(model_folder: Path, collector: OtlpReceiver) -> None:
    schema = generation_pb2.Constraint(json_schema='{"type": "integer"}')
    async with running_server(fake_model(model_folder)) as server:
        await stream(server, text="hello", max_new_tokens=3, output=TRACED, constraint=schema)
        trace = await collector.trace()
    trace.check()
    rpc = attributes_of(trace.root.attributes)
    assert trace.root.name == rpc["rpc.method"] == "dash_api.v1.GenerationService/StreamGenerate"
    assert (rpc["rpc.system.name"], rpc["rpc.response.status_code"]) == ("grpc", "OK")
    assert "error.type" not in rpc
    assert (trace.root.kind, trace.root.status.code) == (Span.SPAN_KIND_SERVER, Status.STATUS_CODE_UNSET)
    generation = attributes_of(trace.generation.attributes)
    assert trace.generation.name == "text_completion fake"
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "dash",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.output.type": "json",
        "dash.constraint": "json_schema",
        "dash.mode": "adaptive",
        "dash.policy": "toy",
        "dash.mean_cost": 0.75,
        "dash.price_of_compute": 0.75,
        "dash.untraced_steps": 0,
    }
    assert expected.items() <= generation.items()
    assert generation["gen_ai.response.id"] == generation["dash.request_id"] == rpc["dash.request_id"]
    assert generation["gen_ai.response.time_to_first_chunk"] > 0
    assert [event.name for event in trace.generation.events] == ["slot granted", "first token"]
    decision = attributes_of(trace.named("int8 layer 1")[0].attributes)
    scores = {"dash.scores.skip": 1.0, "dash.scores.int8": 0.5, "dash.scores.full": -1.0}
    assert scores.items() <= decision.items()
    assert (decision["dash.action"], decision["dash.raised_from"], decision["dash.exposed_ns"]) == ("int8", "skip", 7)
    assert decision["dash.cost_spent"] == pytest.approx(1 / 3)
    assert {resource["service.name"] for resource in collector.resources} == {"dash-llm", "dash-llm-worker"}
    assert all({"service.version", "service.instance.id"} <= resource.keys() for resource in collector.resources)


async def test_calls_of_tools_are_told_and_shown_in_the_messages(model_folder: Path, collector: OtlpReceiver) -> None:
    called = common_pb2.ToolCall(id="1", name="clock", arguments_json='{"zone": "CET"}')
    messages = [
        common_pb2.ChatMessage(role="assistant", content="Well.", tool_calls=[called]),
        common_pb2.ChatMessage(role="tool", content="noon", tool_call_id="1"),
    ]
    chat = common_pb2.ChatPrompt(messages=messages, tools=[common_pb2.Tool(name="clock")])
    async with running_server(fake_model(model_folder), trace_content=True) as server:
        await stream(server, chat=chat, max_new_tokens=3, output=TRACED)
        trace = await collector.trace()
    generation = attributes_of(trace.generation.attributes)
    assert generation["dash.constraint"] == "tool_calls"
    shown = json.loads(str(generation["gen_ai.input.messages"]))[0]["parts"][0]["content"]
    assert shown == 'Well.\n<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call>'


async def test_the_callers_span_is_the_parent_and_a_malformed_one_counts_as_none(
    model_folder: Path, collector: OtlpReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    no_ids = f"00-{'0' * 32}-{SPAN_ID}-01"
    async with running_server(fake_model(model_folder)) as server:
        await stream(server, SAMPLED, text="hello", max_new_tokens=2)
        root = (await collector.trace()).root
        assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
        for malformed in ("x" * 5000, "00-0-0-01", no_ids, f"ff{SAMPLED[2:]}", SAMPLED + "-x"):
            collector.spans.clear()
            assert await stream(server, malformed, text="hello", max_new_tokens=2)
            await stream(server, malformed, text="hello", max_new_tokens=2, output=TRACED)
            root = (await collector.trace()).root
            assert root.trace_id.hex() != TRACE_ID
            assert not root.parent_span_id
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_who_is_traced_without_failing(model_folder: Path, collector: OtlpReceiver) -> None:
    """The ratio counts only if the caller does not decide; the trace option always counts."""
    async with running_server(fake_model(model_folder), trace_ratio=1) as server:
        await stream(server, NOT_SAMPLED, text="hello", max_new_tokens=1)
        await stream(server, text="hello", max_new_tokens=2)
        await stream(server, NOT_SAMPLED, text="hello", max_new_tokens=3, output=TRACED)
        await collector.until(lambda: sum(span.name == "token" for span in collector.spans) >= 5)
    async with running_server(fake_model(model_folder)) as server:
        await stream(server, text="hello", max_new_tokens=4)
        await stream(server, SAMPLED, text="hello", max_new_tokens=5)
        await collector.until(lambda: sum(span.name == "token" for span in collector.spans) >= 10)
    generations = [attributes_of(span.attributes) for span in collector.spans if span.name == "text_completion fake"]
    assert [generation["gen_ai.request.max_tokens"] for generation in generations] == [2, 3, 5]


async def test_slow_requests_are_traced_in_any_case(model_folder: Path, collector: OtlpReceiver) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01), trace_slow_seconds=0.15) as server:
        await stream(server, NOT_SAMPLED, text="hello", max_new_tokens=2)
        await stream(server, NOT_SAMPLED, text="hello", max_new_tokens=30)
        trace = await collector.trace()
    trace.check()
    assert len(trace.named("token")) == 30


async def test_a_passed_deadline_is_an_error_and_traced_with_its_tokens(
    model_folder: Path, collector: OtlpReceiver
) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01)) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generate(timeout=2, text="hello", max_new_tokens=3000)
        trace = await collector.trace()
    trace.check()
    for span in (trace.root, trace.generation):
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert attributes_of(span.attributes)["error.type"] == "DEADLINE_EXCEEDED"
    assert attributes_of(trace.root.attributes)["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert len(trace.named("int8 layer 1")) >= 2, "what was recorded comes after the call was over"


async def test_a_cancelled_request_is_no_error_and_not_ok(model_folder: Path, collector: OtlpReceiver) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01)) as server:
        call = server.stream(text="hello", max_new_tokens=3000, output=TRACED)
        for _ in range(4):
            await call.read()
        call.cancel()
        trace = await collector.trace()
    trace.check()
    assert trace.root.status.code == Status.STATUS_CODE_UNSET
    assert attributes_of(trace.root.attributes)["rpc.response.status_code"] == "CANCELLED"
    assert "error.type" not in attributes_of(trace.root.attributes)
    assert trace.named("int8 layer 1")


async def test_a_lost_worker_leaves_a_trace_without_tokens(model_folder: Path, collector: OtlpReceiver) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01, die_after=5)) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generate(text="hello", max_new_tokens=3000)
        trace = await collector.trace()
    trace.check()
    assert attributes_of(trace.root.attributes)["dash.reason"] == "WORKER_UNAVAILABLE"
    assert [span.name for span in trace.spans[1:]] == ["text_completion fake"]


async def test_what_the_worker_does_not_say_is_not_waited_for_for_ever(
    model_folder: Path, collector: OtlpReceiver
) -> None:
    async with running_server(fake_model(model_folder, keeps_records=1)) as server:
        await server.generate(text="hello", max_new_tokens=3, output=TRACED)
        trace = await collector.trace()
    assert len(trace.spans) == 2


async def test_wrong_requests_are_the_callers_fault_and_traced_only_if_asked(
    model_folder: Path, collector: OtlpReceiver
) -> None:
    async with running_server(fake_model(model_folder)) as server:
        for traceparent in (None, SAMPLED):
            with pytest.raises(grpc.aio.AioRpcError):
                await stream(server, traceparent, max_new_tokens=3)
        trace = await collector.trace()
    (root,) = trace.spans
    assert root.trace_id.hex() == TRACE_ID
    assert root.status.code == Status.STATUS_CODE_UNSET
    assert attributes_of(root.attributes)["dash.reason"] == "INVALID_REQUEST"


@pytest.mark.parametrize("is_allowed", [False, True])
async def test_content_is_traced_only_if_a_setting_says_so(
    model_folder: Path, collector: OtlpReceiver, is_allowed: bool
) -> None:
    """The fake worker's output is the prompt."""
    chat = common_pb2.ChatPrompt(messages=[common_pb2.ChatMessage(role="user", content=CANARY)])
    async with running_server(fake_model(model_folder), trace_content=is_allowed) as server:
        await stream(server, text=CANARY, max_new_tokens=20, stop_strings=("guava",), output=TRACED)
        await stream(server, chat=chat, max_new_tokens=40, output=TRACED)
        await collector.traces(2)
    everything = b"".join(collector.received)
    assert (CANARY.encode() in everything) == is_allowed
    assert (b"guava" in everything) == is_allowed
    assert (b"dash.token.id" in everything) == is_allowed
    if is_allowed:
        text, conversation = [
            span for span in collector.spans if "gen_ai.operation.name" in attributes_of(span.attributes)
        ]
        assert CANARY in attributes_of(text.attributes)["gen_ai.output.messages"]
        assert attributes_of(conversation.attributes)["gen_ai.operation.name"] == "chat"
        assert (
            f'"role": "user", "parts": [{{"type": "text", "content": "{CANARY}"}}]'
            in attributes_of(conversation.attributes)["gen_ai.input.messages"]
        )


async def test_many_requests_at_once_are_whole_traces(model_folder: Path, collector: OtlpReceiver) -> None:
    async with running_server(fake_model(model_folder, num_layers=12), trace_ratio=1) as server:
        await asyncio.gather(*(stream(server, text="hello", max_new_tokens=11) for _ in range(30)))
        assert server.server.tracing is not None
        export = server.server.tracing.export
        await collector.until(lambda: export.exported_spans == 30 * (2 + 11 + 10 * 10))
    assert len(collector.spans) == export.exported_spans
    assert export.dropped_spans == 0
    ids = {span.span_id for span in collector.spans}
    assert sum(span.parent_span_id not in ids for span in collector.spans) == 30
