"""Kills the worker again and again under load, each time a while after it began to serve."""

import asyncio
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import grpc

from benchmarks.soak.callers import Sessions, callers_of, whole_answer
from benchmarks.soak.mixed_requests import mixed_request
from benchmarks.soak.report import Finding, finding
from benchmarks.soak.service import Outcomes, Service, model_variables, running_service


async def run(
    num_kills: int = 10, seconds_between: float = 20, num_callers: int = 16, tiny_model: Path | None = None
) -> list[Finding]:
    """Kills workers and checks every request's end, with the embedded model or a tiny one."""
    outcomes = Outcomes.begin()
    slowest_end = 0.0
    restarts: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        async with running_service(Path(folder), **model_variables(tiny_model, folder)) as service:
            killed_at = [0.0]
            ends: list[float] = []

            async def request(rng: random.Random, source: Service | Sessions) -> None:
                try:
                    await whole_answer(source.stream(mixed_request(rng, is_tiny=tiny_model is not None)))
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.UNAVAILABLE and "while it had" in (error.details() or ""):
                        ends.append(time.monotonic() - killed_at[0])
                    raise

            async with callers_of(service, num_callers, "death", request, outcomes):
                for _ in range(num_kills):
                    await asyncio.sleep(seconds_between)
                    ends.clear()
                    (worker,) = service.server.workers()
                    killed_at[0] = time.monotonic()
                    os.kill(worker.pid, signal.SIGKILL)
                    await service.wait_until_serving(False)
                    await service.wait_until_serving()
                    restarts.append(time.monotonic() - killed_at[0])
                    slowest_end = max(slowest_end, *ends, 0.0)
            await service.generate(mixed_request(random.Random(1), is_tiny=tiny_model is not None))
    codes = set(outcomes.codes)
    return [
        finding(f"{sum(outcomes.codes.values())} requests while the worker was killed {num_kills} times",
                "each ends in a result or UNAVAILABLE", outcomes, codes <= {"OK", "UNAVAILABLE"}),
        finding("from the kill to the last UNAVAILABLE of those it had", "< 1 s", f"{slowest_end:.2f} s",
                slowest_end < 1),
        finding("SERVING again", f"{num_kills} times", f"{len(restarts)} times, after {min(restarts):.1f} to "
                f"{max(restarts):.1f} s", len(restarts) == num_kills),
    ]  # fmt: skip
