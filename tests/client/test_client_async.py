"""What only the async client has: tasks, event loops, and awaiting. All else is tested with both clients."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_dash_server import HELLO, FakeDashServer

from dash_client import AsyncDashClient, AsyncGenerationStream, CancelledError, DashClient, GenerationStream
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


async def test_leaving_a_stream_cancels_on_the_server(server: FakeDashServer) -> None:
    server.script = [*HELLO[:2], server.wait]
    async with AsyncDashClient(server.target) as client:
        async with client.stream("x") as stream:
            assert (await stream.started()).request_id == "r-1"
            async for _ in stream:
                break
        assert await asyncio.to_thread(server.cancelled.wait, 30)
        with pytest.raises(CancelledError):
            await stream.final()


@pytest.mark.parametrize("kind", ["generate", "stream"])
async def test_a_cancelled_task_gets_asyncios_own_error_and_cancels_on_the_server(
    server: FakeDashServer, kind: str
) -> None:
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


async def test_a_stream_whose_wait_timed_out_is_cancelled_and_says_so(server: FakeDashServer) -> None:
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


async def test_closing_the_client_ends_a_call_that_another_task_waits_for(server: FakeDashServer) -> None:
    server.script = [*HELLO[:2], server.wait]
    client = AsyncDashClient(server.target)
    whole = asyncio.create_task(client.generate("x"))
    while not server.requests:
        await asyncio.sleep(0.01)
    await client.close()
    with pytest.raises(CancelledError):
        await whole


def test_a_client_may_be_made_before_its_loop_and_outlive_it(server: FakeDashServer) -> None:
    client = AsyncDashClient(server.target)
    for _ in range(2):
        assert asyncio.run(client.generate("x")).text == "Hello"
    asyncio.run(client.close())


async def test_a_client_is_for_one_loop_at_a_time(server: FakeDashServer) -> None:
    async with AsyncDashClient(server.target) as client:
        await client.generate("x")
        with pytest.raises(RuntimeError, match="event loop"):
            await asyncio.to_thread(asyncio.run, client.generate("x"))
