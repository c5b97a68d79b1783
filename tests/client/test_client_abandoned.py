"""Dropped streams are cancelled on the server within a second."""

import asyncio
import gc
import time

import grpc
from fake_dash_server import HELLO, FakeDashServer, free_port

from dash_client import AsyncDashClient, DashClient

LIMIT_SECONDS = 1.0


def endless(server: FakeDashServer, *, has_slot: bool) -> None:
    """Makes streams send two messages and then nothing, or nothing at all, like a queued request."""
    server.script = [*HELLO[:2], server.wait] if has_slot else [server.wait]


def test_breaking_out_of_the_loop_without_closing(server: FakeDashServer, client: DashClient) -> None:
    endless(server, has_slot=True)
    for _ in client.stream("x"):
        break
    assert server.cancelled.wait(LIMIT_SECONDS)


async def test_breaking_out_of_the_async_loop_without_closing(server: FakeDashServer) -> None:
    endless(server, has_slot=True)
    async with AsyncDashClient(server.target) as client:
        async for _ in client.stream("x"):
            break
        assert await asyncio.to_thread(server.cancelled.wait, LIMIT_SECONDS)


def test_forgetting_a_stream_that_waits_in_the_queue(server: FakeDashServer, client: DashClient) -> None:
    endless(server, has_slot=False)
    stream = client.stream("x")
    while not server.requests:
        time.sleep(0.005)
    del stream
    assert server.cancelled.wait(LIMIT_SECONDS)


def test_a_stream_in_a_cycle_goes_with_the_garbage_of_any_thread(server: FakeDashServer, client: DashClient) -> None:
    endless(server, has_slot=True)
    holder: dict[str, object] = {"stream": client.stream("x")}
    holder["itself"] = holder
    next(holder["stream"])  # type: ignore[call-overload]
    del holder
    gc.collect()
    assert server.cancelled.wait(LIMIT_SECONDS)


def test_a_stream_that_is_over_is_forgotten_in_silence(server: FakeDashServer, client: DashClient) -> None:
    stream = client.stream("x")
    stream.final()
    del stream
    gc.collect()
    assert client.generate("x").text == "Hello"
    assert not server.cancelled.is_set()


def test_a_dropped_stream_of_a_session_is_cancelled_and_the_others_go_on(
    server: FakeDashServer, client: DashClient
) -> None:
    server.scripts["endless"] = [*HELLO[:2], server.wait]
    with client.session() as session:
        for _ in session.stream("endless"):
            break
        gc.collect()
        assert server.cancelled.wait(LIMIT_SECONDS)
        assert session.generate("x").text == "Hello"
    assert server.num_sessions == 1


async def test_a_thousand_streams_of_one_client_at_once() -> None:
    count = 1000
    everybody_is_here = asyncio.Event()
    inside = 0

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> None:
        nonlocal inside
        inside += 1
        if inside == count:
            everybody_is_here.set()
        await everybody_is_here.wait()
        for event in HELLO:
            await context.write(event.SerializeToString())  # type: ignore[union-attr]

    methods = {"StreamGenerate": grpc.unary_stream_rpc_method_handler(stream)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dash_api.v1.GenerationService", methods),))
    port = server.add_insecure_port(f"localhost:{free_port()}")
    await server.start()
    try:
        async with AsyncDashClient(f"localhost:{port}", timeout=60) as client:
            answers = await asyncio.gather(*(client.stream("x").final() for _ in range(count)))
    finally:
        await server.stop(None)
    assert [answer.text for answer in answers] == ["Hello"] * count
