"""Bounds, turns and deadlines over a real socket, with more to do than there are slots."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from dash_api.v1 import model_pb2
from tests.server.refusals import refusal
from tests.server.scraping import scrape
from tests.server.server_harness import RunningServer, fake_model, running_server
from tests.server.test_lifecycle import first_delta

ANN, BOB = "ann-and-her-token", "bob-and-his-token"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[ann]\ntoken = "{ANN}"\n[bob]\ntoken = "{BOB}"\nmax_requests = 2\nmax_tokens = 1000\n')
    return path


async def refusal_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """Returns the code and the reason."""
    refused = await refusal(call)
    return refused.code, refused.reason


async def test_five_hundred_requests_of_one_caller_do_not_starve_anothers_one(
    model_folder: Path, token_file: Path
) -> None:
    model = fake_model(model_folder, token_seconds=0.001)
    limits = {"slots": 2, "max_queue": 64, "max_calls_per_connection": 1024}
    async with running_server(model, token_file=token_file, **limits) as server:
        backlog = [asyncio.create_task(server.generate(token=ANN, text="a", max_new_tokens=20)) for _ in range(500)]
        await server.wait_until_inside(2, 64)
        answer = await server.generate(token=BOB, text="b", max_new_tokens=20)
        assert answer.output.text == "b" * 20
        results = await asyncio.gather(*backlog, return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        waits = [result.finished.usage.queue_seconds for result in results if result not in refused]
        assert answer.finished.usage.queue_seconds < max(waits) / 4  # it overtook most of them
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert 60 <= len(results) - len(refused) <= 500  # one had to leave for the other caller's
        assert server.counts == (0, 0)
        assert server.server.admission.num_inside == 0


async def test_a_callers_own_limits_are_told(model_folder: Path, token_file: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), token_file=token_file) as server:
        refused = await refusal_of(server.generate(token=BOB, text="b", max_new_tokens=1000))
        assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CALLER_LIMIT")
        calls = [server.stream(token=BOB, text="b", max_new_tokens=400) for _ in range(2)]
        for call in calls:
            await first_delta(call)
        refused = await refusal_of(server.generate(token=BOB, text="b", max_new_tokens=1))
        assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CALLER_LIMIT")
        assert (await server.generate(token=ANN, text="a", max_new_tokens=1)).output.text == "a"
        for call in calls:
            call.cancel()


async def test_the_tokens_inside_are_bounded(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), max_queue_tokens=1000) as server:
        call = server.stream(text="abc", max_new_tokens=900)
        await first_delta(call)
        refused = await refusal_of(server.generate(text="abc", max_new_tokens=100))
        assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (await server.generate(text="abc", max_new_tokens=94)).output.token_ids
        call.cancel()


async def measured(server: RunningServer) -> None:
    """The fake worker always reports 0.25 s for the prompt and 0.5 s for the rest."""
    await server.generate(text="abcde", max_new_tokens=6)  # 0.05 s a prompt token, 0.1 s an output token


@pytest.mark.parametrize(("is_measured", "milliseconds"), [(False, 1000), (True, 375)])
async def test_a_full_server_says_when_to_come_back_as_measured(
    model_folder: Path, is_measured: bool, milliseconds: int
) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=2, max_queue=0) as server:
        if is_measured:
            await measured(server)
        calls = [server.stream(text="abc", max_new_tokens=900) for _ in range(2)]
        for call in calls:
            await first_delta(call)
        refused = await refusal(server.generate(text="abc"))
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert refused.details["RetryInfo"].retry_delay.ToMilliseconds() == milliseconds
        assert refused.trailers["grpc-retry-pushback-ms"] == str(milliseconds)
        for call in calls:
            call.cancel()
        await server.wait_until_inside(0, 0)
        assert (await server.generate(text="ok", max_new_tokens=1)).output.text == "o"


@pytest.mark.parametrize(
    ("timeout", "text", "stopping", "is_hopeless"),
    [
        (0.4, "abcdefghij", {}, True),  # the prompt alone takes half a second
        (0.6, "abcdefghij", {}, False),
        (0.6, "a", {"max_new_tokens": 20}, False),  # it may end early
        (0.6, "a", {"max_new_tokens": 20, "ignore_eos": True}, True),
        (0.6, "a", {"max_new_tokens": 20, "ignore_eos": True, "stop_strings": ["x"]}, False),
    ],
)
async def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    model_folder: Path, timeout: float, text: str, stopping: dict[str, Any], is_hopeless: bool
) -> None:
    async with running_server(fake_model(model_folder)) as server:
        await measured(server)
        call = server.generate(timeout=timeout, text=text, stopping={"max_new_tokens": 1, **stopping})
        if is_hopeless:
            started = asyncio.get_running_loop().time()
            assert await refusal_of(call) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT")
            assert asyncio.get_running_loop().time() - started < 0.3
            assert (await server.probe()).num_submits - 1 == 1  # the worker never heard of it
        else:
            assert (await call).output.token_ids


async def test_a_deadline_behind_a_long_queue_is_refused_at_once(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=1) as server:
        await measured(server)
        calls = [server.stream(text="abc", max_new_tokens=900) for _ in range(5)]
        await server.wait_until_inside(1, 4)
        refused = await refusal_of(server.generate(timeout=2.0, text="a", max_new_tokens=1))
        assert refused == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT")
        for call in calls:
            call.cancel()
        await server.wait_until_inside(0, 0)


async def test_small_requests_use_room_only_in_their_turn(model_folder: Path) -> None:
    """The next in line waits for cache room, and later requests do not overtake it for ever."""
    async with running_server(fake_model(model_folder, token_seconds=0.002), cache_tokens=1000) as server:
        first = server.stream(text="abc", max_new_tokens=700)
        await first_delta(first)
        large = asyncio.create_task(server.generate(text="abc", max_new_tokens=600))
        await server.wait_until_inside(1, 1)
        small = asyncio.create_task(server.generate(text="abc", max_new_tokens=10))
        await server.wait_until_inside(1, 2)
        first.cancel()
        await asyncio.gather(large, small)
        assert server.counts == (0, 0)


async def test_the_load_is_what_is_inside_and_how_fast_it_went(model_folder: Path) -> None:
    asked = model_pb2.GetLoadRequest()
    async with running_server(fake_model(model_folder, token_seconds=0.01), slots=2, metrics_port=0) as server:
        idle = await server.model.GetLoad(asked)
        await server.generate(text="abc", max_new_tokens=20)
        calls = [server.stream(text="abc", max_new_tokens=1000) for _ in range(3)]
        await server.wait_until_inside(2, 1)
        busy = await server.model.GetLoad(asked)
        seen = await scrape(server)
        server.server.admission.drain()
        draining = await server.model.GetLoad(asked)
        for call in calls:
            call.cancel()
        await server.wait_until_inside(0, 0)
    assert (idle.slot_count, idle.worker_count, idle.running_request_count, idle.token_count) == (2, 1, 0, 0)
    assert not idle.HasField("decode_tokens_per_second")
    assert not idle.is_draining
    assert (busy.running_request_count, busy.waiting_request_count) == (2, 1)
    assert busy.token_count == 3 * (3 + 1000)
    assert busy.cache_token_count == 2 * (3 + 1000)
    assert (busy.token_limit, busy.cache_token_limit) == (262_144, 8192)
    assert 20 < busy.decode_tokens_per_second < 200
    assert seen.value("dash_decode_speed_per_second") == pytest.approx(busy.decode_tokens_per_second)
    assert draining.is_draining


async def test_a_higher_class_goes_first_and_only_those_who_may_ask_for_it(model_folder: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[ann]\ntoken = "{ANN}"\npriority = "high"\n[bob]\ntoken = "{BOB}"\n')
    model = fake_model(model_folder, token_seconds=0.005)
    async with running_server(model, slots=1, token_file=tokens) as server:
        ended: list[str] = []

        async def ask(name: str, token: str, priority: str) -> None:
            await server.generate(token=token, text="abc", max_new_tokens=10, priority=f"PRIORITY_{priority}")
            ended.append(name)

        calls = [asyncio.create_task(ask("first", BOB, "NORMAL"))]
        await server.wait_until_inside(1, 0)
        for waiting, call in enumerate((("low", BOB, "LOW"), ("usual", BOB, "UNSPECIFIED"), ("high", ANN, "HIGH")), 1):
            calls.append(asyncio.create_task(ask(*call)))
            await server.wait_until_inside(1, waiting)
        await asyncio.gather(*calls)
        refused = await refusal(server.generate(token=BOB, text="abc", priority="PRIORITY_HIGH"))
    assert ended == ["first", "high", "usual", "low"]
    assert refused.fields == ["parameters.priority"]


async def test_a_connection_that_is_old_takes_no_new_calls_and_loses_none(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.02), max_connection_age_seconds=0.2) as server:
        texts: list[str] = []
        seen: list[set[int]] = []
        async for event in server.stream(text="abc", max_new_tokens=60):
            seen.append(connections_to(server.port))
            texts.append(event.delta.text)
        # The stream's own is there until its end, which a reader may see late. Beside it an idle one, which grew old
        # before the call began, may still be closing.
        assert len(set.intersection(*seen[: len(seen) // 2 + 1])) == 1
        assert len("".join(texts)) == 60
        await server.generate(text="abc", max_new_tokens=1)
        assert connections_to(server.port).isdisjoint(seen[0])


def connections_to(port: int) -> set[int]:
    """Returns this process's own ports of its connections to a server."""
    found = psutil.Process().net_connections("tcp")
    return {own.laddr.port for own in found if own.raddr and own.raddr.port == port and own.status == "ESTABLISHED"}
