"""One or several workers that die, hang or never work, and the fate of their requests."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import grpc
import psutil
import pytest

from dash_api.v1 import generation_pb2
from dash_server.worker.__main__ import wait_briefly
from dash_server.worker.messages import decode_from_worker
from dash_server.worker.process import FramedProcess, LocalStarter
from tests.server.refusals import refusal
from tests.server.server_harness import FAKE_WORKER, RunningServer, fake_model, running_server, server_process
from tests.server.test_lifecycle import NOT_SERVING, SERVING, code_of, watch
from tests.server.test_server_process import assert_gone


def worker_pids() -> list[int]:
    """Returns the live workers of the server in this process."""
    pids = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # the process may end meanwhile
            if "fake_worker" in " ".join(process.cmdline()):
                pids.append(process.pid)
    return pids


async def wait_for_workers(number: int) -> list[int]:
    async with asyncio.timeout(30):
        while len(pids := worker_pids()) != number:
            await asyncio.sleep(0.02)
    return pids


async def test_requests_of_a_killed_worker_fail_within_a_second_and_the_next_one_serves(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=2) as server:
        seen: list[int] = []
        watcher = asyncio.create_task(watch(server, seen))
        calls = [server.stream(text="abc", max_new_tokens=900) for _ in range(4)]
        await server.wait_until_inside(2, 2)
        (pid,) = worker_pids()
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        refused = await asyncio.gather(*map(refusal, calls))
        assert time.monotonic() - killed_at < 1
        refused.append(await refusal(server.generate(text="a")))
        assert {(each.code, each.reason) for each in refused} == {(grpc.StatusCode.UNAVAILABLE, "WORKER_UNAVAILABLE")}
        await server.wait_until_serving()
        assert (await server.generate(text="abc", max_new_tokens=3)).output.text == "abc"
        assert seen == [SERVING, NOT_SERVING, SERVING]
        assert server.counts == (0, 0)
        assert server.server.admission.num_inside == 0
        watcher.cancel()


async def test_a_worker_that_cannot_make_graphs_is_followed_by_one_that_does_without(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_server(fake_model(model_folder, graphs_fail=1)) as server:
        assert (await server.generate(text="abc", max_new_tokens=3)).output.text == "abc"
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == [
        "the next worker runs without graphs, more slowly: a CUDA graph cannot be captured: out of memory"
    ]


async def test_a_worker_that_hangs_is_replaced(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = fake_model(model_folder, token_seconds=0.005, hang_after=20)
    async with running_server(model, worker_timeout_seconds=0.4) as server:
        call = server.stream(text="abc", max_new_tokens=900)
        started = time.monotonic()
        assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 2
        await server.wait_until_serving()
        assert "DASH_WORKER_TIMEOUT_SECONDS" in caplog.text
        assert len(await wait_for_workers(1)) == 1


async def test_an_idle_worker_is_not_taken_for_one_that_hangs(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), worker_timeout_seconds=0.2) as server:
        (pid,) = worker_pids()
        await asyncio.sleep(1)
        assert worker_pids() == [pid]
        assert await server.is_serving()


async def test_workers_that_gave_tokens_are_replaced_more_often_than_that(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, die_after=5, token_seconds=0.001)) as server:
        for _ in range(7):
            await server.wait_until_serving()
            assert await code_of(server.stream(text="abc", max_new_tokens=900)) is grpc.StatusCode.UNAVAILABLE


async def test_a_worker_ends_though_whoever_stops_it_is_cancelled() -> None:
    worker = await FramedProcess.spawn(FAKE_WORKER, decode_from_worker)
    stopping = asyncio.create_task(worker.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.wait([stopping])
    assert stopping.cancelled()
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the environment of a process from /proc")
@pytest.mark.parametrize("said", [None, "glibc.malloc.hugetlb=0"])
async def test_a_workers_memory_comes_in_huge_pages_unless_the_user_said_how(
    monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if said is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", said)
    worker = await LocalStarter(FAKE_WORKER).start(print)
    async with asyncio.timeout(10):
        while not (environment := Path(f"/proc/{worker.pid}/environ").read_bytes()):
            await asyncio.sleep(0.01)  # its program is only being loaded
    await worker.stop()
    assert f"GLIBC_TUNABLES={said or 'glibc.malloc.hugetlb=1'}" in environment.decode().split("\0")


async def run_until_done(server: RunningServer, number: int) -> list[object]:
    calls = [server.generate(text="abc", max_new_tokens=50) for _ in range(number)]
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_several_workers_share_the_load_and_one_dying_costs_only_its_own_requests(model_folder: Path) -> None:
    model = fake_model(model_folder, token_seconds=0.005)
    async with running_server(model, workers=3, slots=2) as server:
        await wait_for_workers(3)
        async with asyncio.timeout(30):
            while server.server.dispatcher.num_slots < 6:
                await asyncio.sleep(0.01)
        calls = [server.stream(text="abc", max_new_tokens=100) for _ in range(8)]
        await server.wait_until_inside(6, 2)
        os.kill(worker_pids()[0], signal.SIGKILL)
        codes = await asyncio.gather(*map(code_of, calls))
        assert sorted(code.name for code in codes) == ["OK"] * 6 + ["UNAVAILABLE"] * 2
        assert await server.is_serving()
        await wait_for_workers(3)


async def test_a_request_goes_to_a_worker_whose_lowest_budget_allows_it(model_folder: Path) -> None:
    model = fake_model(model_folder, token_seconds=0.005, budgets="0.5,0.3")
    async with running_server(model, workers=2, slots=4) as server:
        async with asyncio.timeout(30):
            while server.server.dispatcher.load().num_workers < 2:
                await asyncio.sleep(0.01)
        low = generation_pb2.SkipOptions(mode="MODE_ADAPTIVE", policy_name="learned", compute_budget=0.3)
        calls = [server.stream(text="abc", max_new_tokens=900, skip=low) for _ in range(3)]
        await server.wait_until_inside(3, 0)
        assert [link.num_requests for link in server.server._links] == [0, 3]
        calls.append(server.stream(text="abc", max_new_tokens=900))
        await server.wait_until_inside(4, 0)
        assert [link.num_requests for link in server.server._links] == [1, 3]
        for call in calls:
            call.cancel()


async def test_the_first_worker_starts_alone(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, never_ready=1), workers=3, wait=False):
        await asyncio.sleep(0.5)
        assert len(worker_pids()) == 1


async def test_a_cancel_in_the_queue_or_at_a_worker_leaves_nothing(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=2) as server:
        calls = [server.stream(text="abc", max_new_tokens=900) for _ in range(6)]
        await server.wait_until_inside(2, 4)
        for call in calls:
            call.cancel()
        await server.wait_until_inside(0, 0)
        state = await server.wait_for_live_requests(0)
        assert state.num_cancels == state.num_submits - 1
        assert server.server.admission.num_inside == 0
        assert server.server.admission.num_tokens_inside == 0


def test_what_a_worker_started_ends_with_it_and_with_a_killed_server(tmp_path: Path, model_folder: Path) -> None:
    with server_process(tmp_path, model=fake_model(model_folder, starts_child=1, never_ready=1)) as server:
        server.wait_for_port()
        deadline = time.monotonic() + 30
        while len(processes := psutil.Process(server.process.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        worker, child = processes
        worker.kill()
        assert_gone(child)
        while len(processes := psutil.Process(server.process.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.end(signal.SIGKILL)
        for process in processes:
            assert_gone(process)


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}], ids=str)
def test_a_workers_threads_wait_briefly_unless_the_user_said_how(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str]
) -> None:
    names = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    if not said:
        monkeypatch.setenv("GOMP_SPINCOUNT", "to be removed")  # so that the test's end takes back what is set below
        del os.environ["GOMP_SPINCOUNT"]
    wait_briefly()
    assert {name: os.environ[name] for name in names if name in os.environ} == (said or {"GOMP_SPINCOUNT": "2000"})
