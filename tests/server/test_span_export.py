"""Serving goes on with collectors that are absent, slow, refusing or dying, and with nonsense in variables."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from dash_api.v1 import generation_pb2
from dash_server.telemetry.exporting import ExportState
from dash_server.telemetry.span_export import MAX_BATCH_SPANS, SpanExport
from dash_server.telemetry.span_tree import SpanTree
from tests.server.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.server.server_harness import RunningServer, fake_model, running_server

TRACED = generation_pb2.OutputOptions(trace=True)
SPANS_OF_A_REQUEST = 2 + 9 + 8  # one decision for each token but the first


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Limits attempts to half a second, so that each batch is tried once."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.5")
    return monkeypatch


def name_collector(endpoint: pytest.MonkeyPatch, receiver: OtlpReceiver) -> None:
    endpoint.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.endpoint)


async def serve_some(server: RunningServer, number: int = 8) -> None:
    """Sends requests that are all traced, and checks that each is answered as without tracing."""
    started = time.monotonic()
    answers = await asyncio.gather(
        *(server.generate(text="hello", max_new_tokens=9, output=TRACED) for _ in range(number))
    )
    assert [len(answer.output.token_ids) for answer in answers] == [9] * number
    assert time.monotonic() - started < 2


def export_of(server: RunningServer) -> SpanExport:
    assert server.server.tracing is not None
    return server.server.tracing.export


async def accounted(server: RunningServer, num_spans: int) -> None:
    export = export_of(server)
    async with asyncio.timeout(30):
        while export.dropped_spans + export.exported_spans < num_spans:
            await asyncio.sleep(0.01)
    assert export.dropped_spans + export.exported_spans == num_spans


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_absent_collector_costs_one_line_and_counted_spans(
    model_folder: Path, endpoint: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with otlp_receiver() as receiver:
        name_collector(endpoint, receiver)  # gone before it is needed
    async with running_server(fake_model(model_folder)) as server:
        for _ in range(2):
            await serve_some(server)
        await accounted(server, 16 * SPANS_OF_A_REQUEST)
        assert export_of(server).exported_spans == 0
        ended = time.monotonic()
    assert time.monotonic() - ended < 3
    (line,) = warnings(caplog)
    assert line.startswith("traces cannot be exported for now; requests are served all the same: ")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED])
async def test_a_refusing_collector_is_told_of_once_and_used_again_when_it_takes_spans(
    model_folder: Path, endpoint: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: grpc.StatusCode
) -> None:
    caplog.set_level(logging.INFO)
    with otlp_receiver() as receiver:
        name_collector(endpoint, receiver)
        receiver.refuse_with = code
        async with running_server(fake_model(model_folder)) as server:
            for _ in range(2):
                await serve_some(server)
            await accounted(server, 16 * SPANS_OF_A_REQUEST)
            assert export_of(server).exported_spans == 0
            receiver.refuse_with = None
            await serve_some(server, 1)
            await accounted(server, 17 * SPANS_OF_A_REQUEST)
            assert export_of(server).exported_spans == len(receiver.spans) == SPANS_OF_A_REQUEST
    assert len(warnings(caplog)) == 1
    assert "traces are exported again" in caplog.messages


async def test_a_collector_that_dies_in_the_middle_of_a_batch_and_comes_back(
    model_folder: Path, endpoint: pytest.MonkeyPatch
) -> None:
    with otlp_receiver() as receiver:
        name_collector(endpoint, receiver)
        async with running_server(fake_model(model_folder)) as server:
            await serve_some(server, 1)
            await accounted(server, SPANS_OF_A_REQUEST)
            receiver.die_after = 0
            await serve_some(server)
            await accounted(server, 9 * SPANS_OF_A_REQUEST)
            assert export_of(server).dropped_spans > 0
            receiver.die_after = None
            receiver.start()
            async with asyncio.timeout(30):
                while len(receiver.spans) < 2 * SPANS_OF_A_REQUEST:
                    await serve_some(server, 1)
                    await asyncio.sleep(0.1)


async def test_a_slow_collector_slows_nothing_and_ends_with_the_server(
    model_folder: Path, endpoint: pytest.MonkeyPatch
) -> None:
    endpoint.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "60")
    with otlp_receiver() as receiver:
        name_collector(endpoint, receiver)
        receiver.delay_seconds = 30
        async with running_server(fake_model(model_folder)) as server:
            for _ in range(3):
                await serve_some(server)
            export = export_of(server)
            ended = time.monotonic()
        assert time.monotonic() - ended < 4
        await receiver.until(lambda: export.dropped_spans == 24 * SPANS_OF_A_REQUEST)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER", "traceidratio"),  # with the argument below
        ("OTEL_TRACES_EXPORTER", "pigeon"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "zip it"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://[not an address"),
        ("OTEL_RESOURCE_ATTRIBUTES", "nothing"),
    ],
)
async def test_nonsense_in_a_variable_is_one_line_and_the_server_runs(
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "a lot")
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv(variable, value)
        async with running_server(fake_model(model_folder)) as server:
            await serve_some(server)
    (line,) = warnings(caplog)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "")],
    ids=["disabled", "none", "no collector"],
)
async def test_tracing_can_be_switched_off_and_needs_a_collector(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv(variable, value)
    async with running_server(fake_model(model_folder), trace_ratio=1) as server:
        await serve_some(server, 1)
        assert server.server.tracing is None


class Spans:
    """A source of this many spans, made by iterating."""

    def __init__(self, num_spans: int, fails_after: int | None = None) -> None:
        self.num_spans = num_spans
        self.num_made = 0
        self._fails_after = fails_after

    def __iter__(self) -> Iterator[ReadableSpan]:
        tree = SpanTree(1, None, Resource.get_empty())
        for _ in range(self.num_spans):
            if self.num_made == self._fails_after:
                raise ValueError("cut off")
            self.num_made += 1
            yield tree.span("span", None, 1, 2, {})[0]


class Shelf(SpanExporter):
    """An exporter whose first batch takes until `let_go`."""

    def __init__(self, is_open: bool) -> None:
        self.batches: list[int] = []
        self.is_open = is_open

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        while not self.is_open:
            time.sleep(0.005)
        self.batches.append(len(spans))
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.is_open = True


def test_the_queue_is_bounded_in_spans_and_the_newest_are_dropped() -> None:
    shelf = Shelf(is_open=False)
    export = SpanExport(shelf, ExportState("traces"), max_pending_spans=300, max_pending_trees=5)
    sources = [Spans(MAX_BATCH_SPANS), Spans(100), Spans(100), *(Spans(1) for _ in range(9))]
    export.put(sources[0])
    while sources[0].num_made < MAX_BATCH_SPANS:
        time.sleep(0.005)
    for source in sources[1:]:
        export.put(source)
    assert export.dropped_spans == 100 + 5, "of 300 spans 228 were taken, and behind them four of nine requests"
    assert sum(source.num_made for source in sources[1:]) == 0, "spans are made only when they can be exported"
    shelf.is_open = True
    export.close()
    assert export.exported_spans == sum(shelf.batches) == MAX_BATCH_SPANS + 100 + 4


def test_batches_are_small_and_a_source_that_fails_spoils_no_other(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(is_open=True)
    export = SpanExport(shelf, ExportState("traces"))
    for source in (Spans(1000), Spans(300, fails_after=250), Spans(5)):
        export.put(source)
    export.close()
    assert max(shelf.batches) == MAX_BATCH_SPANS <= 512
    assert (export.exported_spans, export.dropped_spans) == (1255, 50)
    assert "spans of a call could not be made" in caplog.messages


def test_a_closed_export_takes_nothing() -> None:
    export = SpanExport(Shelf(is_open=True), ExportState("traces"))
    export.close()
    export.put(Spans(3))
    assert (export.exported_spans, export.dropped_spans) == (0, 3)
