"""Runs many streams at once for minutes, some cancelled, slow or with hopeless deadlines; then some of them alone.

The embedded model, a real worker, planner off: each chosen stream must have the tokens of the same request alone.
"""

import asyncio
import contextlib
import random
import tempfile
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import grpc

from benchmarks.soak.callers import Sessions, callers
from benchmarks.soak.mixed_requests import mixed_request
from benchmarks.soak.report import Finding, finding, first_traceback
from benchmarks.soak.service import Outcomes, Service, model_variables, running_service
from dash_api.v1 import generation_pb2
from dash_client.session_stream import Failure

_IN_SESSIONS = 1 / 3
_CANCELLED, _SLOW, _HURRIED = 0.20, 0.05, 0.05
_SLOW_MESSAGES = 60
"""A slow reader's slow ones: all of a long answer's would take it as long as if it were stuck."""
_GOOD_CODES = {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


@dataclass
class _Load:
    service: Service
    sessions: Sessions
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
        # Costs that are measured anew meanwhile would give a budget another plan.
        variables = model_variables(tiny_model, folder) | {"check_costs": False, "measure_first": True}
        async with running_service(Path(folder), **variables, group_planner=False) as service:
            load = _Load(service, Sessions(service), is_tiny=tiny_model is not None)
            watch = asyncio.create_task(_watch_memory(load))
            async with callers(num_streams, str(seed), partial(_request, load), load.outcomes):
                await asyncio.sleep(seconds)
            await load.sessions.close()
            watch.cancel()
            await asyncio.sleep(1)
            chosen = random.Random(seed).sample(load.samples, min(num_samples, len(load.samples)))
            others: list[str] = []
            for parameters, token_ids, text in chosen:
                alone = await service.generate(parameters)
                if (list(alone.output.token_ids), alone.output.text) != (token_ids, text):
                    others.append(str(parameters.skip).replace("\n", " "))
            service.server.process.terminate()
            code = await asyncio.to_thread(service.server.process.wait, 60)
            log = service.server.log.read_text()
    bad = {code: number for code, number in load.outcomes.codes.items() if code not in _GOOD_CODES}
    return [
        finding(f"{sum(load.outcomes.codes.values())} streams in {seconds:g} s", "no other end than these, none stuck",
                load.outcomes, not bad),
        finding("streams equal to the same request alone", f"all of {len(chosen)}",
                f"{len(chosen) - len(others)}{', others: ' if others else ''}{'; '.join(others)}",
                not others and (len(chosen) == num_samples or seconds < 60)),
        *_memory(load.rss, seconds),
        finding("exit code and tracebacks in the log", "0 and 0",
                f"{code} and {log.count('Traceback')}{first_traceback(log)}",
                code == 0 and "Traceback" not in log),
    ]  # fmt: skip


async def _request(load: _Load, rng: random.Random) -> None:
    """Makes one request, or with some chance one in the session that all share."""
    parameters = mixed_request(rng, is_tiny=load.is_tiny)
    source = load.sessions if rng.random() < _IN_SESSIONS else load.service
    chance = rng.random()
    cancel_after = rng.randint(0, 8) if chance < _CANCELLED else None
    is_slow = _CANCELLED <= chance < _CANCELLED + _SLOW
    is_hurried = _CANCELLED + _SLOW <= chance < _CANCELLED + _SLOW + _HURRIED
    token_ids: list[int] = []
    text = ""
    num_messages = 0
    async with aclosing(source.stream(parameters, rng.uniform(0.001, 0.3) if is_hurried else None)) as stream:
        if cancel_after == 0:  # anywhere: under way, in the queue, in its prompt
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anext(stream), rng.uniform(0, 0.5))
            raise Failure(grpc.StatusCode.CANCELLED, "by this caller")
        async for response in stream:
            token_ids += response.delta.token_ids
            text += response.delta.text
            num_messages += 1
            if num_messages == cancel_after:
                raise Failure(grpc.StatusCode.CANCELLED, "by this caller")
            if is_slow and num_messages < _SLOW_MESSAGES:
                await asyncio.sleep(0.05 if load.is_tiny else 1)
    load.samples.append((parameters, token_ids, text))


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
