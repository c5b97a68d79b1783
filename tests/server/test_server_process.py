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


def started_stream(
    channel: grpc.Channel, max_new_tokens: int, timeout: float | None = None
) -> Iterator[generation_pb2.StreamGenerateResponse]:
    parameters = generation_request(text="abc", max_new_tokens=max_new_tokens).parameters
    request = generation_pb2.StreamGenerateRequest(parameters=parameters)
    call = generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(request, timeout=timeout)
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


def assert_gone(process: psutil.Process) -> None:
    gone, _ = psutil.wait_procs([process], timeout=5)
    assert gone or process.status() == psutil.STATUS_ZOMBIE


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


def test_preparing_takes_no_calls_and_ends_when_the_worker_is_ready(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder), workers=2, arguments=["--prepare"]) as server:
        code, stderr = server.outcome()
    assert code == 0
    assert stderr.count("is ready: ") == stderr.count("ended: status 0") == 1
    assert "listening" not in stderr
    assert not server.port_file.exists()


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
