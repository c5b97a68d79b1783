"""Cancellation, deadlines, back-pressure, a dying worker and a drain, over a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_runtime.events import EndReason
from dash_server import to_pb
from dash_server.worker.link import WorkerStartError
from tests.server.refusals import refusal
from tests.server.server_harness import RunningServer, fake_model, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
DECISIONS = generation_pb2.OutputOptions(return_decisions=True)


async def first_delta(call: grpc.aio.UnaryStreamCall) -> None:
    while (await call.read()).WhichOneof("event") != "delta":
        pass


async def code_of(call: grpc.aio.UnaryStreamCall) -> grpc.StatusCode:
    """Reads all messages, and returns the status at the end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        async with asyncio.timeout(30):
            while await call.read() is not grpc.aio.EOF:
                pass
    return await call.code()


async def test_cancel_of_a_unary_call_frees_the_slot(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005)) as server:
        call = asyncio.create_task(server.generate(text="abc", max_new_tokens=4000))
        await server.wait_for_live_requests(1)
        call.cancel()
        assert (await server.wait_for_live_requests(0)).num_cancels == 1


async def test_headers_and_started_wait_for_the_slot_and_a_queued_request_can_be_cancelled(
    model_folder: Path,
) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=1) as server:
        running = server.stream(text="abc", max_new_tokens=4000)
        await first_delta(running)
        queued = server.stream(text="abc", max_new_tokens=4000)
        await server.wait_until_inside(1, 1)
        headers = asyncio.create_task(queued.initial_metadata())
        assert not (await asyncio.wait([headers], timeout=0.1))[0]
        queued.cancel()
        await server.wait_until_inside(1, 0)
        await asyncio.wait([headers])
        running.cancel()
        state = await server.wait_for_live_requests(0)
        assert (state.num_submits - 1, state.num_cancels) == (1, 1)  # the worker never heard of the queued one


@asynccontextmanager
async def slow_reader(folder: Path) -> AsyncIterator[tuple[RunningServer, grpc.aio.UnaryStreamCall]]:
    """Starts a call whose reader sleeps long enough, at 32 MB/s, to fill any window."""
    model = fake_model(folder, token_seconds=0.001, num_layers=32_768)
    limits = {"context_length": 9000, "cache_tokens": 9000, "max_new_tokens": 4000}
    async with running_server(model, **limits, trace_steps=0) as server:
        call = server.stream(text="abc", max_new_tokens=4000, output=DECISIONS)
        await first_delta(call)
        await asyncio.sleep(1)
        yield server, call


async def test_cancel_while_the_reader_is_slow_frees_the_slot(model_folder: Path) -> None:
    async with slow_reader(model_folder) as (server, call):
        call.cancel()
        assert (await server.wait_for_live_requests(0)).num_cancels == 1


async def test_a_reader_that_was_slow_gets_many_tokens_in_a_message(model_folder: Path) -> None:
    async with slow_reader(model_folder) as (_, call):
        sizes, token_ids = [], []
        while max(sizes, default=0) < 50:
            delta = (await call.read()).delta
            sizes.append(len(delta.token_ids))
            token_ids += delta.token_ids
            assert len(delta.actions) == len(delta.token_ids) * 32_768
        call.cancel()
        # A first message was read before, with any number of tokens.
        output = b"abc" * 3000
        assert bytes(token_ids) in {output[first : first + len(token_ids)] for first in range(3)}


async def test_deadline_while_queued_forgets_the_request(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=1) as server:
        running = server.stream(text="abc", max_new_tokens=4000)
        await first_delta(running)
        assert await code_of(server.stream(text="abc", timeout=0.1)) is grpc.StatusCode.DEADLINE_EXCEEDED
        await server.wait_until_inside(1, 0)


async def test_a_finished_request_is_not_cancelled(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        await server.generate(text="abc", max_new_tokens=3)
        async for _ in server.stream(text="abc", max_new_tokens=3):
            pass
        state = await server.probe()
        assert (state.num_submits - 1, state.num_cancels, state.num_stops) == (2, 0, 0)


async def test_a_stop_string_stops_the_worker_early(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005)) as server:
        answer = await server.generate(text="abc", stop_strings=("bc",), max_new_tokens=4000)
        assert answer.output.text == "a"
        assert 3 <= answer.finished.usage.output_token_count < 100
        state = await server.probe()
        assert (state.num_live, state.num_cancels, state.num_stops) == (0, 0, 1)


async def watch(server: RunningServer, seen: list[int]) -> None:
    async for response in server.health.Watch(health_pb2.HealthCheckRequest()):
        seen.append(response.status)


async def test_one_watcher_leaving_does_not_silence_the_others(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        seen: list[int] = []
        staying = asyncio.create_task(watch(server, seen))
        leaving = asyncio.create_task(watch(server, []))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.sleep(0.05)
        await server.server.drain(grace_seconds=1)
        await asyncio.sleep(0.05)
        assert seen == [SERVING, NOT_SERVING]
        staying.cancel()


async def test_health_knows_the_services_and_no_others(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        for service in ("dash_api.v1.GenerationService", "dash_api.v1.ModelService", "alive", "ready"):
            assert await server.is_serving(service)
        assert (await refusal(server.is_serving("somebody.Else"))).code is grpc.StatusCode.NOT_FOUND


async def test_a_worker_that_is_never_ready_is_given_up(model_folder: Path) -> None:
    model = fake_model(model_folder, never_ready=1)
    async with running_server(model, wait=False, start_timeout_seconds=0.3) as server:
        with pytest.raises(WorkerStartError, match=r"not ready within 0\.3 s"):
            await server.worker


async def test_a_drain_finishes_what_runs_and_sends_everybody_else_away(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=1) as server:
        inside = [asyncio.create_task(server.generate(text="abc", max_new_tokens=60)) for _ in range(2)]
        await server.wait_until_inside(1, 1)
        drain = asyncio.create_task(server.server.drain(grace_seconds=5))
        async with asyncio.timeout(2):
            while await can_connect(server.port):
                await asyncio.sleep(0.01)
        # The old connection takes no new call either.
        assert (await refusal(server.generate(text="a"))).code is UNAVAILABLE
        assert not drain.done()
        for answer in await asyncio.gather(*inside):
            assert answer.finished.usage.output_token_count == 60
        await drain


async def can_connect(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


async def test_a_drain_cuts_off_what_outlasts_the_grace(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.005)) as server:
        call = server.stream(text="abc", max_new_tokens=4000)
        await first_delta(call)
        await server.server.drain(grace_seconds=0.1)
        assert await code_of(call) is UNAVAILABLE


async def test_a_long_prompt_does_not_hold_up_other_calls(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), max_message_bytes=16_000_000) as server:
        request = model_pb2.TokenizeRequest(text="word " * 400_000)
        long_call = asyncio.ensure_future(server.model.Tokenize(request))
        num_checks = 0
        while not long_call.done():
            await server.is_serving()
            await asyncio.sleep(0.01)
            num_checks += 1
        assert len((await long_call).token_ids) == 2_000_000
        assert num_checks > 10


async def test_tokenize_refuses_more_tokens_than_fit_in_a_message(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), max_message_bytes=20_000) as server:
        await server.model.Tokenize(model_pb2.TokenizeRequest(text="a" * 15_000))
        refused = await refusal(server.model.Tokenize(model_pb2.TokenizeRequest(text="é" * 9_900)))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unexpected_error_tells_the_caller_its_request_id_only(
    model_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(to_pb._FINISH_REASONS, EndReason.LENGTH)
    async with running_server(fake_model(model_folder)) as server:
        refused = await refusal(server.generate(text="secret prompt", max_new_tokens=2))
    assert refused.code is grpc.StatusCode.INTERNAL
    request_id = refused.details["ErrorInfo"].metadata["request_id"]
    assert refused.message == f"internal error in request {request_id}; the server's log has more"
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text


async def test_mode_and_policy_in_use_are_told(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), default_mode="full_depth") as server:
        started = (await server.generate(text="a", max_new_tokens=1)).started
        assert (started.mode, started.policy) == (common_pb2.MODE_FULL_DEPTH, "full-depth")
        assert not started.HasField("compute_budget")


async def test_a_server_is_alive_before_it_is_ready_and_says_what_it_is_doing(model_folder: Path) -> None:
    model = fake_model(model_folder, never_ready=1, doing="compiling native code")
    async with running_server(model, wait=False) as loading:
        assert await loading.is_serving("alive")
        assert not await loading.is_serving("ready")
        assert not await loading.is_serving()
        assert (await refusal(loading.model.GetModel(model_pb2.GetModelRequest()))).code is UNAVAILABLE
        while "being loaded (compiling native code); try" not in (refused := await refusal(loading.generate())).message:
            assert refused.code is UNAVAILABLE
            await asyncio.sleep(0.01)
