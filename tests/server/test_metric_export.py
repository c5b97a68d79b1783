"""Export of metrics: collectors that work, are missing or slow; nonsense in OTEL_ variables; busy ports."""

import re
import signal
import time
from pathlib import Path

import grpc
import pytest

from dash_api.v1 import generation_pb2_grpc
from dash_server.logs import configure_logging
from tests.server.otlp_receiver import attributes_of, otlp_receiver
from tests.server.scraping import REQUESTS, read, scrape
from tests.server.server_harness import (
    ServerProcess,
    fake_model,
    free_port,
    generation_request,
    running_server,
    server_process,
)
from tests.server.test_server_process import connect


def complaints(stderr: str) -> list[str]:
    """Returns warnings and errors, from the logger's name on."""
    return [
        re.split(" (?:WARNING|ERROR) ", line)[1] for line in stderr.splitlines() if re.search(" (WARNING|ERROR) ", line)
    ]


def serve_one(server: ServerProcess) -> None:
    with connect(server) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        answer = stub.Generate(generation_request(text="secret", max_new_tokens=6), timeout=10)
        assert answer.output.text == "secret"


CANNOT_BE_USED = "metrics are not exported, since an OTEL_ variable cannot be used: "


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "soon"}, CANNOT_BE_USED),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}, CANNOT_BE_USED),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "0"}, CANNOT_BE_USED),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "often"}, "Found invalid value for export interval"),
        ({"OTEL_METRICS_EXPORTER": "pigeon"}, "OTEL_METRICS_EXPORTER: only otlp and none are known here"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL: only grpc is spoken here"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "nonsense"}, "Invalid key value resource attribute pair"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "hunter2"}, "a header is not name=value"),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "/none", "OTEL_EXPORTER_OTLP_INSECURE": "false"}, "Failed to read"),
    ],
)
@pytest.mark.usefixtures("root_logger_as_it_was")
async def test_nonsense_in_otel_variables_is_a_line_and_the_service_runs(
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    sentence: str,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "0.2")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    configure_logging("INFO")
    async with running_server(fake_model(model_folder)) as server:
        assert (await server.generate(text="secret", max_new_tokens=6)).output.text == "secret"
    stderr = capsys.readouterr().err
    assert [line for line in complaints(stderr) if sentence in line], stderr
    assert "Traceback" not in stderr
    assert "hunter2" not in stderr


async def test_a_collector_is_sent_what_the_endpoint_shows(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with otlp_receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", collector.endpoint)
        async with running_server(fake_model(model_folder), metrics_port=0) as server:
            await server.generate(text="hello", max_new_tokens=4)
            seen = await scrape(server)
    # The last export is at shutdown, not a minute later.
    points = {metric.name: metric for metric in collector.metrics}
    duration = points["gen_ai.server.request.duration"]
    assert duration.unit == "s"
    (point,) = duration.histogram.data_points
    assert point.count == seen.value(f"{REQUESTS}_count") == 1
    assert list(point.explicit_bounds) == [0.01 * 2**power for power in range(14)]
    assert attributes_of(point.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "dash",
        "gen_ai.request.model": "fake",
        "dash.mode": "adaptive",
    }
    tokens = {attributes_of(p.attributes)["dash.token.type"]: p.as_int for p in points["dash.tokens"].sum.data_points}
    assert tokens == {"input": 5, "output": 4, "cached_input": 0}
    assert points["dash.cache.limit"].gauge.data_points[0].as_int == 8192
    assert {name.replace(".", "_") for name in points} <= {
        name.removesuffix("_count").removesuffix("_total").removesuffix("_seconds").removesuffix("_per_second")
        for name in seen.series
    }


def test_a_collector_that_refuses_is_one_warning_and_is_told_of_when_it_comes_back(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with otlp_receiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "0.3")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
        collector.refuse_with = grpc.StatusCode.UNAVAILABLE
        with server_process(tmp_path, model=fake_model(model_folder)) as server:
            serve_one(server)
            wait_for_line(server, "cannot be exported")
            time.sleep(0.5)  # of several attempts
            serve_one(server)
            collector.refuse_with = None
            wait_for_line(server, "exported again")
            code, stderr = server.end(signal.SIGTERM)
    assert code == 0
    assert stderr.count("metrics are exported again") == 1
    assert collector.metrics
    (line,) = complaints(stderr)
    assert "metrics cannot be exported for now; requests are served all the same: " in line
    assert "StatusCode.UNAVAILABLE" in line
    assert "Traceback" not in stderr


def wait_for_line(server: ServerProcess, words: str) -> None:
    deadline = time.monotonic() + 30
    while words not in server.log.read_text():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)


def test_a_collector_that_never_answers_does_not_hold_up_the_end(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with otlp_receiver() as collector:
        collector.delay_seconds = 60
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", collector.endpoint)
        with server_process(tmp_path, model=fake_model(model_folder)) as server:
            serve_one(server)
            began = time.monotonic()
            code, stderr = server.end(signal.SIGTERM)
            seconds = time.monotonic() - began
    assert code == 0
    assert seconds < 4
    assert "Traceback" not in stderr
    assert "Fatal" not in stderr


def test_a_disabled_sdk_means_no_endpoint_and_a_warning(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    port = free_port()
    with server_process(tmp_path, model=fake_model(model_folder), metrics_port=port) as server:
        serve_one(server)
        with pytest.raises(OSError, match="refused"):
            read(port)
        code, stderr = server.end(signal.SIGTERM)
    assert code == 0
    assert complaints(stderr) == [
        "dash_server.server [-] DASH_METRICS_PORT: there is no endpoint, since OTEL_SDK_DISABLED is true"
    ]
