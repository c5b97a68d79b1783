"""Runs a `dash-server` process for the soak, and watches it from outside: memory, files, status codes."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dash_api.v1 import generation_pb2, generation_pb2_grpc
from dash_server.main import WORKER_COMMAND
from tests.server.server_harness import ServerProcess, open_channel, server_process

START_SECONDS = 600.0
STUCK_SECONDS = 120.0
"""A call that has not ended by then is stuck."""


class ServerEnded(Exception):
    """A server has ended by itself."""

    def __init__(self, code: int, log: str) -> None:
        super().__init__(f"exit code {code}: {log}")
        self.code, self.log = code, log


@dataclass
class Service:
    """A running server, with a channel to it."""

    server: ServerProcess
    port: int
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def is_serving(self) -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            response = await self.health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            return response.status == health_pb2.HealthCheckResponse.SERVING
        return False

    async def wait_until_serving(self, is_serving: bool = True) -> None:
        async with asyncio.timeout(START_SECONDS):
            while await self.is_serving() != is_serving:
                if self.server.process.poll() is not None:
                    raise ServerEnded(*self.server.outcome())
                await asyncio.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.server.process.pid)
        return [server, *server.children(recursive=True)]

    def rss_bytes(self) -> int:
        """Returns the resident memory of server and workers together."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def num_files(self) -> int:
        """Returns the number of the server's open descriptors."""
        return psutil.Process(self.server.process.pid).num_fds()

    async def generate(self, parameters: generation_pb2.GenerationParameters) -> generation_pb2.GenerateResponse:
        """Makes one unary call, with a timeout if it is stuck."""
        return await self.generation.Generate(
            generation_pb2.GenerateRequest(parameters=parameters), timeout=STUCK_SECONDS
        )

    async def stream(
        self, parameters: generation_pb2.GenerationParameters, timeout: float | None = None
    ) -> AsyncGenerator[generation_pb2.StreamGenerateResponse]:
        """Yields the messages of an answer in a call of its own, which ends when this is closed.

        Raises:
            grpc.RpcError: it ended with another status than OK.
        """
        call = self.generation.StreamGenerate(generation_pb2.StreamGenerateRequest(parameters=parameters),
                                              timeout=timeout)  # fmt: skip
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()


def model_variables(tiny_model: Path | None, folder: str) -> dict[str, object]:
    """Returns settings for the embedded model as usually served, or for a tiny one, eager and with its own cache."""
    if tiny_model is None:
        return {"model": "embedded"}
    tiny = {"model": tiny_model, "native": "off", "num_threads": 1, "cache_folder": f"{folder}/cache"}
    # Plans for a budget are compared with those of another start.
    return tiny | {"check_costs": False, "measure_first": True}


@asynccontextmanager
async def running_service(
    folder: Path,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    worker_command: Sequence[str] = WORKER_COMMAND,
    **variables: Any,
) -> AsyncIterator[Service]:
    """Runs a SERVING server on a free loopback port. Its log is `stderr` in `folder`."""
    with server_process(folder, worker_command=worker_command, **variables) as server:
        port = await asyncio.to_thread(server.wait_for_port)
        async with open_channel(port, credentials) as channel:
            service = Service(server, port, channel)
            await service.wait_until_serving()
            yield service


@dataclass
class Outcomes:
    """Counts how calls ended, by status; stuck ones apart."""

    codes: Counter[str]
    started: float

    @classmethod
    def begin(cls) -> "Outcomes":
        return cls(Counter(), time.monotonic())

    def add(self, error: BaseException | None) -> None:
        """Counts one call by its error; None means success."""
        if error is None:
            self.codes["OK"] += 1
        elif isinstance(error, TimeoutError):
            self.codes["STUCK"] += 1
        elif isinstance(error, grpc.RpcError):
            self.codes[error.code().name] += 1
        else:
            self.codes[type(error).__name__] += 1

    def __str__(self) -> str:
        return ", ".join(f"{code} {number}" for code, number in sorted(self.codes.items()))
