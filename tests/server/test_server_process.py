"""The `dash-server` command as a process: settings, signals, exit codes, imports and orphans."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dash_api.v1 import generation_pb2, generation_pb2_grpc
from tests.server.server_harness import ServerProcess, fake_model, generation_request, server_process


def wait_until_serving(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for response in stub.Watch(health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True):
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return


def connect(server: ServerProcess) -> grpc.Channel:
    channel = grpc.insecure_channel(f"127.0.0.1:{server.wait_for_port()}")
    wait_until_serving(channel)
    return channel


def started_stream(channel: grpc.Channel, max_new_tokens: int) -> Iterator[generation_pb2.StreamGenerateResponse]:
    parameters = generation_request(text="abc", max_new_tokens=max_new_tokens).parameters
    request = generation_pb2.StreamGenerateRequest(parameters=parameters)
    call = generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(request)
    next(call)
    return call


def complaints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("dash-server: ")]


def test_a_server_serves_without_torch_and_exits_with_0_after_sigterm(tmp_path: Path, model_folder: Path) -> None:
    tell = "print('imported:', [name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    with server_process(tmp_path, model=fake_model(model_folder), before_exit=tell) as server:
        with connect(server) as channel:
            answer = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
                generation_request(text="secret", max_new_tokens=6)
            )
            assert answer.output.text == "secret"
        code, stderr = server.end(signal.SIGTERM)
    assert code == 0
    assert "imported: []\n" in stderr
    assert f"[{answer.started.request_id}] finished: 6 prompt tokens" in stderr
    assert "secret" not in stderr
    assert "Traceback" not in stderr


def test_settings_are_logged_and_unknown_ones_are_pointed_out(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder), slots=7, cache_toknes=3) as server:
        connect(server).close()
        code, stderr = server.end(signal.SIGINT)
    assert code == 0
    assert " slots=7 " in stderr
    assert "DASH_CACHE_TOKNES is set, but there is no such setting; did you mean DASH_CACHE_TOKENS?" in stderr


def test_sigterm_lets_a_running_request_finish(tmp_path: Path, model_folder: Path) -> None:
    with (
        server_process(tmp_path, model=fake_model(model_folder, token_seconds=0.01)) as server,
        connect(server) as channel,
    ):
        call = started_stream(channel, max_new_tokens=80)
        server.process.send_signal(signal.SIGTERM)
        *_, last = call
        assert last.finished.usage.output_token_count == 80
        code, stderr = server.outcome()
    assert code == 0
    assert "draining: 1 requests inside" in stderr


def test_a_second_signal_ends_server_and_worker_at_once(tmp_path: Path, model_folder: Path) -> None:
    with (
        server_process(tmp_path, model=fake_model(model_folder, token_seconds=0.01)) as server,
        connect(server) as channel,
    ):
        (worker,) = server.workers()
        call = started_stream(channel, max_new_tokens=4000)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.process.poll() is None
        code, _ = server.end(signal.SIGTERM)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert code == 128 + signal.SIGTERM
        assert_gone(worker)


def test_a_killed_server_leaves_no_worker_behind(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder)) as server:
        connect(server).close()
        (worker,) = server.workers()
        server.end(signal.SIGKILL)
        assert_gone(worker)


def assert_gone(process: psutil.Process) -> None:
    gone, _ = psutil.wait_procs([process], timeout=5)
    assert gone or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("port", 70000, "DASH_PORT: must be less than or equal to 65535, got '70000'"),
        ("slots", "many", "DASH_SLOTS: must be a valid integer"),
        ("precision", "fp8", "DASH_PRECISION: must be 'bfloat16' or 'float32', got 'fp8'"),
        ("default_mode", "fixed", "DASH_DEFAULT_MODE: must be 'full_depth', 'adaptive' or 'exact', got 'fixed'"),
        ("default_compute_budget", "nan", "DASH_DEFAULT_COMPUTE_BUDGET: must be a finite number"),
        ("policy_file", "/no/such/file", "DASH_POLICY_FILE: "),
        ("workers", "4-2", "DASH_WORKERS: must be from 1 to 64"),
        ("workers", "many", "DASH_WORKERS: must be a number, or a range such as 2-8, got 'many'"),
        ("ray_address", "ray:/x", "DASH_RAY_ADDRESS: must be auto, host:port or ray://host:port, got 'ray:/x'"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, name: str, value: object, sentence: str) -> None:
    with server_process(tmp_path, **{name: value}) as server:
        code, stderr = server.outcome()
    assert code == 2
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"dash-server: {sentence}")


def test_a_model_folder_that_this_machine_does_not_have_is_one_line(tmp_path: Path) -> None:
    with server_process(tmp_path, model=fake_model(tmp_path / "elsewhere")) as server:
        code, stderr = server.outcome()
    assert code == 2
    (line,) = complaints(stderr)
    assert "DASH_MODEL and DASH_CACHE_FOLDER must be folders that all machines share" in line


def test_two_wrong_settings_are_two_lines(tmp_path: Path) -> None:
    with server_process(tmp_path, slots=0, lane="fast") as server:
        code, stderr = server.outcome()
    assert code == 2
    assert [line.partition(": must")[0] for line in complaints(stderr)] == [
        "dash-server: DASH_LANE",
        "dash-server: DASH_SLOTS",
    ]


@pytest.mark.parametrize(("argument", "code", "words"), [("--help", 0, "DASH_PORT"), ("--port=1", 2, "--port=1")])
def test_an_argument_starts_no_server(argument: str, code: int, words: str) -> None:
    command = [sys.executable, "-m", "dash_server.main", argument]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == code
    assert words in result.stdout + result.stderr


def test_an_address_in_use_is_one_line(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder)) as first:
        port = first.wait_for_port()
        (tmp_path / "second").mkdir()
        with server_process(
            tmp_path / "second", model=fake_model(model_folder), port=port, log_level="ERROR"
        ) as second:
            code, stderr = second.outcome()
    assert code == 2
    assert stderr == f"dash-server: cannot listen on 127.0.0.1, port {port}: Address already in use\n"


def test_a_refusal_of_the_worker_is_one_line(tmp_path: Path, model_folder: Path) -> None:
    model = fake_model(model_folder, startup_failed="nothing is at /no/model")
    with server_process(tmp_path, model=model, log_level="ERROR") as server:
        code, stderr = server.outcome()
    assert (code, stderr) == (2, "dash-server: nothing is at /no/model\n")


def test_preparing_takes_no_calls_and_ends_when_the_worker_is_ready(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder), workers=2, arguments=["--prepare"]) as server:
        code, stderr = server.outcome()
    assert code == 0
    assert stderr.count("is ready: ") == stderr.count("ended: status 0") == 1
    assert "listening" not in stderr
    assert not server.port_file.exists()


def test_what_cannot_be_prepared_is_one_line(tmp_path: Path, model_folder: Path) -> None:
    model = fake_model(model_folder, startup_failed="nothing is at /no/model")
    with server_process(tmp_path, model=model, log_level="ERROR", arguments=["--prepare"]) as server:
        code, stderr = server.outcome()
    assert (code, stderr) == (2, "dash-server: nothing is at /no/model\n")


def test_preparing_that_is_interrupted_ends_its_worker_and_says_that_it_failed(
    tmp_path: Path, model_folder: Path
) -> None:
    model = fake_model(model_folder, never_ready=1, doing="compiling")
    with server_process(tmp_path, model=model, arguments=["--prepare"]) as server:
        while not (workers := server.workers()):
            time.sleep(0.02)
        code, _ = server.end(signal.SIGTERM)
        assert_gone(workers[0])
    assert code == 1


def test_a_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    with server_process(tmp_path, model=fake_model(tmp_path), log_level="ERROR") as server:
        code, stderr = server.outcome()
    assert code == 2
    assert complaints(stderr) == [f"dash-server: There is no file {tmp_path}/tokenizer.json."]
    assert "Traceback" not in stderr


def test_a_worker_that_keeps_dying_ends_the_server(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder, die_at_start=1)) as server:
        code, stderr = server.outcome()
    assert code == 1
    assert len(complaints(stderr)) == 1
    assert "the worker died 5 times in a row before it gave a token" in complaints(stderr)[0]


def test_a_signal_while_the_model_loads_ends_the_server(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder, never_ready=1)) as server:
        server.wait_for_port()
        code, _ = server.end(signal.SIGTERM)
    assert code == 0


def test_a_terminals_interrupt_does_not_reach_the_worker(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder)) as server:
        connect(server).close()
        (worker,) = server.workers()
        assert os.getpgid(worker.pid) != os.getpgid(server.process.pid)
