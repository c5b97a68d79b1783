"""Workers on a Ray cluster of one machine: a head without CPUs, and nodes for two workers each. Nothing is faked but
the model, in all tests but one.

Needs the extra `ray`. The cluster is made once; tests that break something come last.
"""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from dash_api.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from dash_client import DashClient
from dash_server.main import WORKER_COMMAND
from tests.ray_cluster import actor_of, add_node, ray_cluster, worker_processes
from tests.server.server_harness import (
    ServerProcess,
    fake_model,
    generation_request,
    server_process,
    write_model_folder,
)
from tests.server.test_server_process import assert_gone, complaints, connect, started_stream

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`"),
    pytest.mark.alone,
    # Ray's own helpers, in this process.
    pytest.mark.filterwarnings("ignore"),
]

CPUS_OF_NODE = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(CPUS_OF_NODE) as made:
        yield made


@contextmanager
def server_on(cluster: Any, folder: Path, **variables: object) -> Iterator[ServerProcess]:
    """Runs `dash-server` with two workers, each of which needs a whole node."""
    given = {"ray_address": cluster.address, "workers": 2, "num_threads": 2, "slots": 2, "worker_host": "127.0.0.1"}
    with server_process(folder, **{**given, **variables}) as server:
        yield server


class Front:
    """A connected server, for the tests."""

    def __init__(self, server: ServerProcess, channel: grpc.Channel) -> None:
        self.server = server
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.model = model_pb2_grpc.ModelServiceStub(channel)

    def wait_for_workers(self, number: int, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while self.load().worker_count != number:
            assert time.monotonic() < deadline, self.server.log.read_text()
            time.sleep(0.05)

    def load(self) -> model_pb2.GetLoadResponse:
        return self.model.GetLoad(model_pb2.GetLoadRequest())

    def stream(self, max_new_tokens: int = 3000) -> Any:
        return started_stream(self.channel, max_new_tokens)

    def answer(self) -> str:
        return self.generation.Generate(generation_request(text="abc", max_new_tokens=3)).output.text


def code_of(call: Any) -> grpc.StatusCode:
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@contextmanager
def front_on(cluster: Any, folder: Path) -> Iterator[Front]:
    """Runs a server with two fake workers, one on each node, that give a token every 5 ms."""
    model = fake_model(write_model_folder(folder / "model"), token_seconds=0.005)
    with server_on(cluster, folder, model=model, worker_timeout_seconds=2) as server, connect(server) as channel:
        front = Front(server, channel)
        front.wait_for_workers(2)
        yield front
        if server.process.poll() is None:
            code, log = server.end(signal.SIGTERM)
            assert code == 0
            assert "Traceback" not in log
    assert worker_processes() == []


@pytest.fixture(scope="module")
def shared_front(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with front_on(cluster, tmp_path_factory.mktemp("front")) as front:
        yield front


@pytest.fixture
def front(shared_front: Front) -> Front:
    """A server that all the later tests share, with both of its workers. It takes the whole cluster."""
    shared_front.wait_for_workers(2)
    return shared_front


def test_tokens_equal_those_of_a_local_process(cluster: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """A real model; and TLS, at the machine's own address."""
    issuer = trustme.CA()
    issuer.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = issuer.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    shared = {"model": tiny_folder, "cache_folder": tmp_path / "cache", "native": "off", "check_costs": "false"}
    tls = {"tls_certificate_file": tmp_path / "chain.pem", "tls_key_file": tmp_path / "key.pem"}
    ray = {"ray_address": cluster.address}
    answers = []
    for name, places in (("local", {}), ("ray", ray)):
        folder = tmp_path / name
        folder.mkdir()
        given = {**shared, **tls, **places, "num_threads": 1, "worker_command": WORKER_COMMAND}
        with (
            server_process(folder, **given) as server,
            DashClient(f"localhost:{server.wait_for_port()}", ca_file=tmp_path / "ca.pem") as client,
        ):
            client.wait_until_ready(timeout=90)
            options = {"max_new_tokens": 40, "ignore_eos": True, "seed": 7}
            results = [
                client.generate("Once upon a time", mode=mode, temperature=temperature, **options)
                for mode, temperature in (("full_depth", 0), ("adaptive", 0.8), ("exact", 0))
            ]
            answers.append([list(result.token_ids) for result in results])
            code, log = server.end(signal.SIGTERM)
            assert code == 0, log
    assert answers[0] == answers[1]
    assert "listening for workers on 127.0.0.1" not in log


def test_a_cancel_and_a_deadline_free_a_remote_slot_within_a_step(cluster: Any, tmp_path: Path) -> None:
    step_seconds = 0.4
    model = fake_model(write_model_folder(tmp_path / "model"), token_seconds=step_seconds)
    with server_on(cluster, tmp_path, model=model, workers=1, slots=1) as server, connect(server) as channel:
        front = Front(server, channel)
        for ending in ("cancel", "deadline"):
            call = started_stream(channel, 1000, timeout=1.5 if ending == "deadline" else 60)
            if ending == "cancel":
                call.cancel()
            assert code_of(call).name == {"cancel": "CANCELLED", "deadline": "DEADLINE_EXCEEDED"}[ending]
            freed = time.monotonic()
            # Alone in the one slot: its own two tokens take one step, and the one before takes at most one.
            front.generation.Generate(generation_request(text="abc", max_new_tokens=1))
            assert time.monotonic() - freed < 2 * step_seconds + 0.3
        assert server.end(signal.SIGTERM)[0] == 0
    assert worker_processes() == []


def test_without_tls_a_port_that_other_machines_reach_is_refused(cluster: Any, tmp_path: Path) -> None:
    model = fake_model(write_model_folder(tmp_path / "model"))
    with server_on(cluster, tmp_path, model=model, worker_host="0.0.0.0") as server:
        code, log = server.outcome()
    assert code == 2
    (line,) = complaints(log)
    assert line.startswith("dash-server: DASH_WORKER_HOST: ")


def test_a_cluster_that_is_not_there_ends_the_start_with_one_line(tmp_path: Path) -> None:
    model = fake_model(write_model_folder(tmp_path / "model"))
    with server_process(tmp_path, model=model, ray_address="127.0.0.1:9", num_threads=1) as server:
        code, log = server.outcome()
    assert code == 2
    (line,) = complaints(log)
    assert line.startswith("dash-server: DASH_RAY_ADDRESS: cannot connect to the Ray cluster at 127.0.0.1:9: ")


def test_a_drain_finishes_streams_on_both_nodes_and_leaves_no_process(cluster: Any, tmp_path: Path) -> None:
    with front_on(cluster, tmp_path) as front:
        calls = [front.stream(300), front.stream(300)]
        workers = worker_processes()
        actors = [actor_of(worker) for worker in workers]
        front.server.process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor(2) as pool:
            assert [code.name for code in pool.map(code_of, calls)] == ["OK", "OK"]
        code, _ = front.server.outcome()
        assert code == 0
    for process in [*workers, *actors]:
        assert_gone(process)


def test_a_killed_server_leaves_no_worker(cluster: Any, tmp_path: Path) -> None:
    with front_on(cluster, tmp_path) as front:
        calls = [front.stream(3000), front.stream(3000)]
        workers = worker_processes()
        front.server.end(signal.SIGKILL)
        for worker in workers:
            assert_gone(worker)
        assert [code_of(call).name for call in calls] == ["UNAVAILABLE"] * 2


@pytest.mark.parametrize("killed", ["actor", "worker"])
def test_a_killed_actor_or_worker_loses_only_its_own_requests_and_is_replaced(front: Front, killed: str) -> None:
    calls = [front.stream(400), front.stream(400)]
    victim, other = worker_processes()
    actor = actor_of(victim)
    (actor if killed == "actor" else victim).kill()
    assert_gone(victim)
    assert_gone(actor)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(code.name for code in pool.map(code_of, calls)) == ["OK", "UNAVAILABLE"]
    front.wait_for_workers(2)
    assert other.is_running()
    assert {process.pid for process in worker_processes()} > {other.pid}


def test_a_stopped_worker_trips_the_limit_of_silence_and_is_replaced(front: Front) -> None:
    calls = [front.stream(900), front.stream(900)]
    victim, _ = worker_processes()
    started = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(code.name for code in pool.map(code_of, calls)) == ["OK", "UNAVAILABLE"]
    assert time.monotonic() - started < 15
    assert_gone(victim)
    front.wait_for_workers(2)
    assert "DASH_WORKER_TIMEOUT_SECONDS" in front.server.log.read_text()


def test_a_lost_node_costs_its_requests_and_a_new_one_takes_its_place(cluster: Any, front: Front) -> None:
    calls = [front.stream(600), front.stream(600)]
    node = cluster.worker_nodes.copy().pop()
    cluster.remove_node(node, allow_graceful=False)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(code.name for code in pool.map(code_of, calls)) == ["OK", "UNAVAILABLE"]
    assert front.answer() == "abc"
    assert front.load().worker_count == 1
    add_node(cluster, CPUS_OF_NODE)
    front.wait_for_workers(2)


def test_streams_go_on_without_the_control_store_and_the_server_outlives_the_cluster(
    cluster: Any, front: Front
) -> None:
    calls = [front.stream(600), front.stream(600)]
    cluster.head_node.kill_gcs_server()
    with ThreadPoolExecutor(2) as pool:
        assert [code.name for code in pool.map(code_of, calls)] == ["OK", "OK"]
    assert front.answer() == "abc"
    # Ray's library ends its process when it has waited in vain, and some nodes end, too.
    deadline = time.monotonic() + 40
    while "the launcher of Ray's workers ended" not in front.server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert front.load().worker_count <= 2
    front.server.process.send_signal(signal.SIGTERM)
    assert front.server.outcome()[0] == 0
