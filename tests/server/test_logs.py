"""Log lines: JSON or for people, with the ids of the task, and with nothing that a caller sent."""

import json
import logging
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from dash_api.v1 import generation_pb2_grpc
from dash_server.logs import FewOfAKind, configure_logging, request_id_of_task, trace_id_of_task
from tests.server.server_harness import fake_model, generation_request, server_process
from tests.server.test_server_process import connect

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def log_in_a_request(capsys: pytest.CaptureFixture[str], log_format: str) -> str:
    """Returns stderr after one record with an exception, in a task with both ids."""
    configure_logging("INFO", log_format)
    request, trace = request_id_of_task.set("r1"), trace_id_of_task.set(TRACE_ID)
    try:
        raise ValueError('a "quoted"\nbreak')
    except ValueError:
        logging.getLogger("some.where").exception("it failed %d times", 3)
    finally:
        request_id_of_task.reset(request)
        trace_id_of_task.reset(trace)
    return capsys.readouterr().err


@pytest.mark.usefixtures("root_logger_as_it_was")
def test_a_record_is_one_json_line_with_ids_and_exception(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = log_in_a_request(capsys, "json").splitlines()
    fields = json.loads(line)
    assert abs(datetime.fromisoformat(fields.pop("time")).timestamp() - datetime.now().timestamp()) < 60
    exception = fields.pop("exception")
    assert fields == {
        "level": "ERROR",
        "logger": "some.where",
        "message": "it failed 3 times",
        "request_id": "r1",
        "trace_id": TRACE_ID,
    }
    assert exception.startswith("Traceback")
    assert exception.endswith('ValueError: a "quoted"\nbreak')


@pytest.mark.usefixtures("root_logger_as_it_was")
def test_a_line_for_people_has_both_ids(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = log_in_a_request(capsys, "console").splitlines()
    assert first.endswith(f" ERROR some.where [r1] it failed 3 times (trace {TRACE_ID})")
    assert second == "Traceback (most recent call last):"


@pytest.mark.usefixtures("root_logger_as_it_was")
def test_outside_of_requests_json_has_no_ids(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json")
    logging.getLogger("some.where").info("hello")
    assert json.loads(capsys.readouterr().err).keys() == {"time", "level", "logger", "message"}


@pytest.mark.usefixtures("root_logger_as_it_was")
def test_a_header_that_opentelemetry_cannot_read_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    logging.getLogger("opentelemetry.util.re").warning("Header format invalid: %s", "hunter2")
    stderr = capsys.readouterr().err
    assert "a header is not name=value" in stderr
    assert "hunter2" not in stderr


@pytest.mark.usefixtures("root_logger_as_it_was")
def test_a_traceback_of_opentelemetry_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    try:
        raise OSError("no such file")
    except OSError:
        logging.getLogger("opentelemetry.sdk").exception("it failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ERROR opentelemetry.sdk [-] it failed: no such file")


def test_every_line_of_a_server_is_json_where_that_is_asked_for(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder), log_format="JSON") as server:
        with connect(server) as channel:
            answer = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
                generation_request(text="secret", max_new_tokens=6)
            )
        code, stderr = server.end(signal.SIGTERM)
    assert code == 0
    lines = [json.loads(line) for line in stderr.splitlines()]
    (finished,) = [line for line in lines if line["message"].startswith("finished: 6 prompt tokens")]
    assert finished["request_id"] == answer.started.request_id
    assert finished["logger"] == "dash_server.generation"
    assert "secret" not in stderr


@pytest.mark.parametrize(("log_format", "expected"), [("json", "ready"), ("console", "worker: ready\n")])
def test_a_worker_process_logs_as_its_environment_says(log_format: str, expected: str) -> None:
    program = "import logging; from dash_server.logs import configure_worker_logging as c; c(); logging.info('ready')"
    environment = {**os.environ, "DASH_LOG_FORMAT": log_format}
    stderr = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stderr
    assert (json.loads(stderr)["message"] if log_format == "json" else stderr) == expected


def test_a_flood_of_lines_is_cut_and_told() -> None:
    now = 0.0
    few = FewOfAKind(most=2, clock=lambda: now)

    def line(text: str, level: int = logging.INFO) -> str | None:
        record = logging.LogRecord("dash", level, "", 0, text, ("x",), None)
        return record.getMessage() if few.filter(record) else None

    assert [line("refused: %s") for _ in range(5)] == ["refused: x"] * 2 + [None] * 3
    assert line("finished: %s") == "finished: x"
    assert [line("it broke: %s", logging.WARNING) for _ in range(5)] == ["it broke: x"] * 5
    now = 1.0
    assert [line("refused: %s") for _ in range(2)] == ["refused: x (and 3 lines like it before)", "refused: x"]
