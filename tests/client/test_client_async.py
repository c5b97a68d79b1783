"""The async client, against a real server in a thread. It equals the sync client except for the awaiting."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fake_dash_server import HELLO, FakeDashServer, delta, fail, started
from test_client_errors import EXPECTED

from dash_api.v1 import model_pb2
from dash_client import (
    AsyncDashClient,
    AsyncGenerationStream,
    CancelledError,
    DashClient,
    DashError,
    DeadlineExceededError,
    GenerationStream,
    HealthStatus,
    InvalidArgumentError,
    NotFoundError,
    ServerError,
    UnavailableError,
)
from dash_client.stream_state import StreamState


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    def surface(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        methods = {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"}
        methods["__init__"] = kind.__init__  # type: ignore[misc]
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in methods.items()
        }

    assert surface(DashClient) == surface(AsyncDashClient)
    names = {name for name in vars(GenerationStream) if name[0] != "_"}
    assert names == {name for name in vars(AsyncGenerationStream) if name[0] != "_"} == {"started", "final", "cancel"}


async def test_generate_and_a_drained_stream_agree() -> None:
    with FakeDashServer() as server:
        async with AsyncDashClient(server.target) as client:
            whole = await client.generate("x", temperature=0.5)
            async with client.stream("x") as stream:
                assert (await stream.started()).request_id == "r-1"
                pieces = [piece async for piece in stream]
            assert await stream.final() == whole
            assert await client.chat("x") == whole
            assert await client.chat_stream("x").final() == whole
    assert "".join(piece.text for piece in pieces) == whole.text == "Hello"
    assert server.requests[0].parameters.sampling.temperature == 0.5
    assert server.requests[2].parameters.chat.messages[0].content == "x"


async def test_facts_are_those_of_the_sync_client() -> None:
    with FakeDashServer() as server:
        server.decisions["r-1"] = model_pb2.GetDecisionsResponse(request_id="r-1", layer_count=4, mode=1)
        async with AsyncDashClient(server.target) as client:
            with DashClient(server.target) as other:
                assert await client.model_info() == other.model_info()
                assert await client.policy_info("random") == other.policy_info("random")
                assert await client.tokenize("x") == other.tokenize("x")
                assert await client.decisions("r-1") == other.decisions("r-1")
                assert await client.health() is other.health() is HealthStatus.SERVING
            with pytest.raises(NotFoundError):
                await client.policy_info("x")


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_every_status_is_a_dash_error_from_every_call(code: grpc.StatusCode) -> None:
    expected = EXPECTED.get(code, ServerError)
    with FakeDashServer([fail(code, "it went wrong")]) as server:
        async with AsyncDashClient(server.target, retries=0) as client:
            with pytest.raises(DashError) as from_generate:
                await client.generate("x")
            with pytest.raises(DashError) as from_stream:
                await anext(client.stream("x"))
            with pytest.raises(DashError) as from_started:
                await client.stream("x").started()
            with pytest.raises(DashError) as from_final:
                await client.stream("x").final()
    for caught in (from_generate, from_stream, from_started, from_final):
        assert type(caught.value) is expected
        assert caught.value.code == code.name
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


async def test_a_failed_stream_fails_the_same_way_again() -> None:
    script = [*HELLO[:2], fail(grpc.StatusCode.UNAVAILABLE, "the worker died")]
    with FakeDashServer(script) as server:
        async with AsyncDashClient(server.target) as client:
            stream = client.stream("x")
            assert (await anext(stream)).text == "Hel"
            for _ in range(2):
                with pytest.raises(UnavailableError) as caught:
                    await anext(stream)
                assert caught.value.request_id == "r-1"


async def test_messages_that_make_no_sense_cancel_the_call() -> None:
    with FakeDashServer() as server:
        server.script = [started(), delta("x", [1], [4, 4, 4]), server.wait]
        async with AsyncDashClient(server.target) as client:
            with pytest.raises(ServerError, match="cannot read"):
                await client.stream("x").final()
        assert server.cancelled.wait(30)


async def test_leaving_a_stream_cancels_on_the_server() -> None:
    with FakeDashServer() as server:
        server.script = [*HELLO[:2], server.wait]
        async with AsyncDashClient(server.target) as client:
            async with client.stream("x") as stream:
                async for _ in stream:
                    break
            assert await asyncio.to_thread(server.cancelled.wait, 30)
            with pytest.raises(CancelledError) as caught:
                await stream.final()
            assert caught.value.request_id == "r-1"


async def test_a_stream_that_another_task_cancels_is_no_cancelled_task() -> None:
    with FakeDashServer() as server:
        server.script = [*HELLO[:2], server.wait]
        async with AsyncDashClient(server.target) as client:
            stream = client.stream("x")
            await anext(stream)
            asyncio.get_running_loop().call_later(0.1, stream.cancel)
            with pytest.raises(CancelledError):
                await stream.final()


@pytest.mark.parametrize("kind", ["generate", "stream"])
async def test_a_cancelled_task_gets_asyncios_own_error_and_cancels_on_the_server(kind: str) -> None:
    with FakeDashServer() as server:
        server.script = [*HELLO[:2], server.wait]
        async with AsyncDashClient(server.target) as client:
            task = asyncio.create_task(client.generate("x") if kind == "generate" else client.stream("x").final())
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if kind == "stream":
                assert await asyncio.to_thread(server.cancelled.wait, 30)


class BeginningCall:
    """A call that gRPC has not sent yet: it is not cancelled with the task that waits for it."""

    is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    def cancel(self) -> None:
        self.is_cancelled = True


async def test_a_cancelled_task_cancels_a_call_that_is_only_beginning() -> None:
    call = BeginningCall()
    facts: Any = SimpleNamespace(read=None, constraint=None, num_answers=1, cancelled=lambda _: None)
    task = asyncio.create_task(AsyncGenerationStream(call, StreamState(facts)).final())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.is_cancelled


async def test_a_stream_whose_wait_timed_out_is_cancelled_and_says_so() -> None:
    with FakeDashServer() as server:
        server.script = [*HELLO[:2], server.wait]
        async with AsyncDashClient(server.target) as client:
            stream = client.stream("x")
            await anext(stream)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await anext(stream)
            assert await asyncio.to_thread(server.cancelled.wait, 30)
            with pytest.raises(CancelledError):
                await anext(stream)


async def test_closing_the_client_ends_its_calls_and_refuses_new_ones() -> None:
    with FakeDashServer() as server:
        server.script = [*HELLO[:2], server.wait]
        client = AsyncDashClient(server.target)
        stream = client.stream("x")
        await anext(stream)
        whole = asyncio.create_task(client.generate("x"))
        while len(server.requests) < 2:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(CancelledError):
            await anext(stream)
        with pytest.raises(CancelledError):
            await whole
        with pytest.raises(CancelledError, match="closed"):
            await client.generate("x")
        with pytest.raises(CancelledError, match="closed"):
            client.stream("x")


async def test_a_timeout_is_the_calls_or_the_clients() -> None:
    with FakeDashServer() as server:
        server.script = [*HELLO[:2], server.wait]
        async with AsyncDashClient(server.target, timeout=0.2) as client:
            with pytest.raises(DeadlineExceededError, match=r"0\.2 s"):
                await client.stream("x").final()
            with pytest.raises(DeadlineExceededError, match=r"0\.1 s"):
                await client.generate("x", timeout=0.1)
            with pytest.raises(InvalidArgumentError, match="timeout"):
                await client.generate("x", timeout=0)


async def test_waiting_ends_when_the_server_serves() -> None:
    with FakeDashServer(serving=False) as server:
        async with AsyncDashClient(server.target) as client:
            with pytest.raises(UnavailableError, match="NOT_SERVING"):
                await client.wait_until_ready(0.3)
            timer = threading.Timer(0.2, server.set_serving, [True])
            timer.start()
            await client.wait_until_ready(5)
            timer.join()


def test_a_client_may_be_made_before_its_loop_and_outlive_it() -> None:
    with FakeDashServer() as server:
        client = AsyncDashClient(server.target)
        for _ in range(2):
            assert asyncio.run(client.generate("x")).text == "Hello"
        asyncio.run(client.close())


async def test_a_client_is_for_one_loop_at_a_time() -> None:
    with FakeDashServer() as server:
        async with AsyncDashClient(server.target) as client:
            await client.generate("x")
            with pytest.raises(RuntimeError, match="event loop"):
                await asyncio.to_thread(asyncio.run, client.generate("x"))
