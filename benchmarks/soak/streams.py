"""Runs many streams at once for minutes, some cancelled, slow or with hopeless deadlines; then some of them alone.

The embedded model, a real worker, planner off: each chosen stream must have the tokens of the same request alone.
"""

import asyncio
import contextlib
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import grpc

from benchmarks.soak.mixed_requests import mixed_request
from benchmarks.soak.report import Finding, finding
from benchmarks.soak.service import STUCK_SECONDS, Outcomes, Service, model_variables, running_service
from dash_api.v1 import generation_pb2

_CANCELLED, _SLOW, _HURRIED = 0.20, 0.05, 0.05
_GOOD_CODES = {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


@dataclass
class _Load:
    service: Service
    until: float
    outcomes: Outcomes = field(default_factory=Outcomes.begin)
    is_tiny: bool = False
    samples: list[tuple[generation_pb2.GenerationParameters, list[int], str]] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    """Pairs of seconds since the start, and bytes."""


async def run(
    seconds: float = 600, num_streams: int = 64, num_samples: int = 100, seed: int = 1, tiny_model: Path | None = None
) -> list[Finding]:
    """Runs the load and the comparison, with the embedded model or a tiny one."""
    with tempfile.TemporaryDirectory() as folder:
        async with running_service(Path(folder), **model_variables(tiny_model, folder), group_planner=False) as service:
            load = _Load(service, time.monotonic() + seconds, is_tiny=tiny_model is not None)
            watch = asyncio.create_task(_watch_memory(load))
            callers = (_caller(load, random.Random(f"{seed} {number}")) for number in range(num_streams))
            await asyncio.gather(*callers)
            watch.cancel()
            await asyncio.sleep(1)
            chosen = random.Random(seed).sample(load.samples, min(num_samples, len(load.samples)))
            num_equal = 0
            for parameters, token_ids, text in chosen:
                alone = await service.generate(parameters)
                num_equal += list(alone.output.token_ids) == token_ids and alone.output.text == text
            service.server.process.terminate()
            code = await asyncio.to_thread(service.server.process.wait, 60)
            log = service.server.log.read_text()
    bad = {code: number for code, number in load.outcomes.codes.items() if code not in _GOOD_CODES}
    return [
        finding(f"{sum(load.outcomes.codes.values())} streams in {seconds:g} s", "no other end than these, none stuck",
                load.outcomes, not bad),
        finding("streams equal to the same request alone", f"all of {len(chosen)}", num_equal,
                num_equal == len(chosen) and (len(chosen) == num_samples or seconds < 60)),
        *_memory(load.rss, seconds),
        finding("exit code and tracebacks in the log", "0 and 0",
                f"{code} and {log.count('Traceback')}{_first_traceback(log)}",
                code == 0 and "Traceback" not in log),
    ]  # fmt: skip


def _first_traceback(log: str) -> str:
    """Returns the log around the first traceback, so that a rare one can be understood; nothing without one."""
    place = log.find("Traceback")
    return "" if place < 0 else f": {log[max(0, place - 500) : place + 2500]}"


async def _caller(load: _Load, rng: random.Random) -> None:
    while time.monotonic() < load.until:
        error: BaseException | None = None
        try:
            await _one(load, rng)
        except (grpc.aio.AioRpcError, TimeoutError) as caught:
            error = caught
        except asyncio.CancelledError:  # of the call itself, which was cancelled here
            load.outcomes.codes["CANCELLED"] += 1
            continue
        load.outcomes.add(error)
        if error is not None:
            await asyncio.sleep(0.1)


async def _one(load: _Load, rng: random.Random) -> None:
    parameters = mixed_request(rng, is_tiny=load.is_tiny)
    chance = rng.random()
    cancel_after = rng.randint(0, 8) if chance < _CANCELLED else None
    is_slow = _CANCELLED <= chance < _CANCELLED + _SLOW
    is_hurried = _CANCELLED + _SLOW <= chance < _CANCELLED + _SLOW + _HURRIED
    request = generation_pb2.StreamGenerateRequest(parameters=parameters)
    call = load.service.generation.StreamGenerate(request, timeout=rng.uniform(0.001, 0.3) if is_hurried else None)
    if cancel_after == 0:
        await asyncio.sleep(rng.uniform(0, 0.5))  # anywhere: under way, in the queue, in its prompt
        call.cancel()
    token_ids: list[int] = []
    text = ""
    num_messages = 0
    while (response := await _next(call)) is not grpc.aio.EOF:
        token_ids += response.delta.token_ids
        text += response.delta.text
        num_messages += 1
        if num_messages == cancel_after:
            call.cancel()
        if is_slow:
            await asyncio.sleep(0.05 if load.is_tiny else 1)
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(await call.code(), await call.initial_metadata(), await call.trailing_metadata())
    load.samples.append((parameters, token_ids, text))


async def _next(call: grpc.aio.UnaryStreamCall) -> generation_pb2.StreamGenerateResponse:
    """Returns the next message. A stream without one for so long is stuck, however long a slow reader takes in all."""
    async with asyncio.timeout(STUCK_SECONDS):
        return await call.read()


async def _watch_memory(load: _Load) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            load.rss.append((time.monotonic() - load.outcomes.started, load.service.rss_bytes()))
            await asyncio.sleep(2)


def _memory(rss: list[tuple[float, int]], seconds: float) -> list[Finding]:
    if seconds < 180:
        return []
    # Memory varies with the requests being served, so the medians of whole minutes are compared.
    minutes = [
        median(size for moment, size in rss if first <= moment < first + 60) / 1e6
        for first in range(60, int(seconds) - 59, 60)
    ]
    growth = minutes[-1] / minutes[0] - 1
    seen = f"{growth:+.1%}; medians of its minutes from the second on, in MB: " + ", ".join(f"{m:.0f}" for m in minutes)
    return [finding("memory of server and worker, growth after the first minute", "< 3 %", seen, growth < 0.03)]
