"""Health needs no token, so what it holds is bounded by address."""

import asyncio
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from dash_server.health import MOST_WATCHES
from tests.server.refusals import refusal
from tests.server.server_harness import RunningServer, fake_model, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING


async def first_status(server: RunningServer) -> int:
    """Begins a watch, and returns the first status of it."""
    return (await anext(aiter(server.health.Watch(health_pb2.HealthCheckRequest())))).status


async def test_an_address_has_so_many_watches_and_no_more(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), max_calls_per_connection=1024) as server:
        watches = [server.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(MOST_WATCHES)]
        for watch in watches:
            assert (await anext(aiter(watch))).status == SERVING
        assert (await refusal(first_status(server))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await server.is_serving()
        watches[0].cancel()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await first_status(server) == SERVING
                    break
                except grpc.aio.AioRpcError:  # the server has not heard of it yet
                    await asyncio.sleep(0.01)


async def test_bytes_that_are_no_message_are_an_invalid_argument(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        for method in ("grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"):
            call = server.channel.unary_stream(f"/{method}")(b"\x0a\xff")
            assert (await refusal(anext(aiter(call)))).code is grpc.StatusCode.INVALID_ARGUMENT, method
