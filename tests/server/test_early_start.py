"""A stand-in serves while native code is compiled, and another worker takes over without losing a request."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_server.worker.starter import WorkerStartError
from tests.server.scraping import scrape
from tests.server.server_harness import RunningServer, fake_model, running_server, server_process
from tests.server.test_lifecycle import code_of, first_delta
from tests.server.test_scaling import Clock, turn
from tests.server.test_server_process import assert_gone
from tests.server.test_workers import wait_for_workers, worker_pids

STAND_IN = "the stand-in"
COMPILED = "the compiled one"


@pytest.fixture(autouse=True)
def quick_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_server.worker_pool._TICK_SECONDS", 0.02)
    monkeypatch.setattr("dash_server.worker.link._FIRST_RESTART_DELAY_SECONDS", 0.01)


@asynccontextmanager
async def early_server(
    model_folder: Path, compiled: Path, model: dict[str, object] | None = None, **settings: object
) -> AsyncIterator[RunningServer]:
    """Runs a server whose stand-in serves until the file `compiled` exists."""
    options: dict[str, object] = {
        "stand_in": 1,
        "token_seconds": 0.005,
        "early.note": STAND_IN,
        "beside_stand_in.note": COMPILED,
        "beside_stand_in.waits_for": compiled,
    }
    async with running_server(fake_model(model_folder, **(options | (model or {}))), **settings) as server:
        yield server


async def note_of(server: RunningServer, **parameters: object) -> str:
    """Returns which worker ran a request."""
    return (await server.generate(text="abc", max_new_tokens=3, **parameters)).started.policy_note


async def is_compiling(server: RunningServer) -> bool:
    return (await server.model.GetModel(model_pb2.GetModelRequest())).is_compiling


async def wait_until_compiled(server: RunningServer) -> None:
    async with asyncio.timeout(30):
        while await is_compiling(server) or server.server.dispatcher.load().num_workers != 1:
            await asyncio.sleep(0.01)


async def test_a_stand_in_serves_while_the_other_worker_starts_and_then_ends(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with early_server(model_folder, tmp_path / "compiled", metrics_port=0) as server:
        assert await note_of(server) == STAND_IN
        assert await is_compiling(server)
        assert (await scrape(server)).value("dash_workers_stand_in") == 1
        assert len(await wait_for_workers(2)) == 2
        (tmp_path / "compiled").touch()
        await wait_until_compiled(server)
        assert await note_of(server) == COMPILED
        assert (await scrape(server)).value("dash_workers_stand_in") == 0
        await wait_for_workers(1)
        assert await note_of(server) == COMPILED
        assert await server.is_serving()
    assert [text in caplog.text for text in ("served uncompiled", "takes all requests from now on")] == [True, True]


async def test_going_over_loses_no_stream_and_each_stays_on_its_worker(model_folder: Path, tmp_path: Path) -> None:
    async with early_server(model_folder, tmp_path / "compiled", slots=2) as server:
        calls = [server.stream(text="abc", max_new_tokens=150) for _ in range(4)]
        await server.wait_until_inside(2, 2)
        (tmp_path / "compiled").touch()
        await wait_until_compiled(server)
        assert server.counts == (4, 0)
        calls.append(server.stream(text="abc", max_new_tokens=150))
        answers = [[message async for message in call] for call in calls]
        notes = [answer[0].started.policy_note for answer in answers]
        assert notes == [STAND_IN, STAND_IN, COMPILED, COMPILED, COMPILED]
        for answer in answers:
            assert b"".join(bytes(message.delta.token_ids) for message in answer) == b"abc" * 50
            assert answer[-1].finished.usage.output_token_count == 150
        await wait_for_workers(1)


async def test_a_request_that_only_the_stand_ins_facts_allow_still_runs_on_it(
    model_folder: Path, tmp_path: Path
) -> None:
    model = {"beside_stand_in.least_budget": 0.8}
    async with early_server(model_folder, tmp_path / "compiled", model, slots=1) as server:
        low = generation_pb2.SkipOptions(
            mode=common_pb2.MODE_ADAPTIVE, policy_name="learned", compute_budget=0.3
        )  # below the stand-in's own, which takes it all the same
        running = server.stream(text="abc", max_new_tokens=300)
        await first_delta(running)
        waiting = asyncio.create_task(note_of(server, skip=low))
        await server.wait_until_inside(1, 1)
        (tmp_path / "compiled").touch()
        await wait_until_compiled(server)
        with pytest.raises(grpc.aio.AioRpcError, match=r"below 0\.8"):
            await note_of(server, skip=low)
        assert await note_of(server) == COMPILED
        assert await waiting == STAND_IN
        assert await code_of(running) is grpc.StatusCode.OK


async def test_a_stand_in_that_dies_costs_its_requests_and_is_replaced(model_folder: Path, tmp_path: Path) -> None:
    async with early_server(model_folder, tmp_path / "compiled", {"early.die_after": 40}) as server:
        follower = await wait_for_workers(2)
        assert await code_of(server.stream(text="abc", max_new_tokens=900)) is grpc.StatusCode.UNAVAILABLE
        await server.wait_until_serving()
        assert await note_of(server) == STAND_IN
        assert await is_compiling(server)
        assert len(set(follower) & set(await wait_for_workers(2))) == 1  # the other one went on
        (tmp_path / "compiled").touch()
        await wait_until_compiled(server)
        assert await note_of(server) == COMPILED
        await wait_for_workers(1)


async def test_the_stand_in_stays_if_the_other_worker_cannot_start(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = {"beside_stand_in.startup_failed": "out of memory", "whole.note": "a new one"}
    async with early_server(model_folder, tmp_path / "compiled", model) as server:
        stream = server.stream(text="abc", max_new_tokens=900)
        await first_delta(stream)
        async with asyncio.timeout(30):
            while await is_compiling(server) or len(worker_pids()) > 1:
                await asyncio.sleep(0.01)
        assert await code_of(stream) is grpc.StatusCode.OK
        assert await note_of(server) == STAND_IN
        assert "restart 5 of 5 failed: out of memory" in caplog.text
        assert "a worker is given up, 1 remain" in caplog.text
        psutil.Process(worker_pids()[0]).kill()  # the next one has nobody to stand in for
        await server.wait_until_serving(False)
        await server.wait_until_serving()
        assert await note_of(server) == "a new one"


async def test_a_stand_in_that_never_works_does_not_keep_the_other_worker_from_serving(
    model_folder: Path, tmp_path: Path
) -> None:
    async with early_server(model_folder, tmp_path / "compiled", {"early.die_when_ready": 1}, wait=False) as server:
        await wait_for_workers(1)
        (tmp_path / "compiled").touch()
        async with asyncio.timeout(30):
            while not server.server._links[-1].is_ready:
                await asyncio.sleep(0.01)
        assert await note_of(server) == COMPILED
        await wait_for_workers(1)
        assert not server.worker.done()


async def test_a_worker_with_nothing_to_compile_is_alone(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        assert not await is_compiling(server)
        await asyncio.sleep(0.2)
        assert len(worker_pids()) == 1


@pytest.mark.parametrize("setting", ["early_start", "compile", "check_costs"])
async def test_without_the_setting_native_code_or_corrected_costs_there_is_no_stand_in(
    model_folder: Path, setting: str
) -> None:
    model = fake_model(model_folder, stand_in=1, **{"whole.note": "whole"})
    async with running_server(model, **{setting: False}) as server:
        assert await note_of(server) == "whole"
        assert not await is_compiling(server)


async def test_further_workers_start_when_the_first_one_is_compiled(model_folder: Path, tmp_path: Path) -> None:
    async with early_server(model_folder, tmp_path / "compiled", workers=2) as server:
        await wait_for_workers(2)
        await asyncio.sleep(0.2)
        assert len(worker_pids()) == 2
        (tmp_path / "compiled").touch()
        async with asyncio.timeout(30):
            while [link.is_ready for link in server.server._links] != [False, True, True]:
                await asyncio.sleep(0.01)
        await wait_for_workers(2)


async def test_a_stand_in_that_leaves_does_not_come_back_when_workers_are_added(
    model_folder: Path, tmp_path: Path
) -> None:
    clock = Clock()
    async with early_server(
        model_folder, tmp_path / "compiled", {"whole.note": "added"}, workers="1-2", slots=1, clock=clock
    ) as server:
        calls = [server.stream(text="abc", max_new_tokens=3000) for _ in range(3)]
        await server.wait_until_inside(1, 2)
        (tmp_path / "compiled").touch()
        await wait_until_compiled(server)
        await server.wait_until_inside(2, 1)
        await turn(clock, 5)
        await server.wait_until_inside(3, 0)
        notes = [(await call.read()).started.policy_note for call in calls]
        assert notes == [STAND_IN, COMPILED, "added"]
        for call in calls:
            call.cancel()
        await wait_for_workers(2)


async def test_if_both_are_given_up_the_server_ends(model_folder: Path, tmp_path: Path) -> None:
    model = {"early.die_after": 1, "whole.die_at_start": 1, "beside_stand_in.startup_failed": "no memory"}
    async with early_server(model_folder, tmp_path / "compiled", model) as server:
        async with asyncio.timeout(30):
            while await is_compiling(server):
                await asyncio.sleep(0.01)
        assert await code_of(server.stream(text="abc", max_new_tokens=9)) is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(WorkerStartError):
            await asyncio.wait_for(server.worker, 30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_while_a_stand_in_serves_ends_both_workers(
    tmp_path: Path, model_folder: Path, number: signal.Signals
) -> None:
    model = fake_model(model_folder, stand_in=1, **{"beside_stand_in.never_ready": 1})
    with server_process(tmp_path, model=model) as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.wait_for_port()}") as channel:
            for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20):
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        deadline = time.monotonic() + 20
        while len(workers := server.workers()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        code, _ = server.end(number)
        assert code == (0 if number is signal.SIGTERM else -number)
        for worker in workers:
            assert_gone(worker)


def test_preparing_starts_no_stand_in(tmp_path: Path, model_folder: Path) -> None:
    model = fake_model(model_folder, stand_in=1, **{"early.startup_failed": "a stand-in"})
    with server_process(tmp_path, model=model, arguments=["--prepare"]) as server:
        code, stderr = server.outcome()
    assert code == 0, stderr
