"""`python -m benchmarks.wire`: processor time of a token on its way from the worker to the caller, by process.

The tests' fake worker gives every stream one token a step at a steady pace, so that what is left is the wire: the
server's process, the worker's messages, and the client's process, which is this one. Processor time is robust against
other work on the machine; time by the clock is not. `--model embedded` takes a real worker instead, and adds the
engine alone in this process, in turn: the service's speed is given as a share of the engine's.
"""

import argparse
import asyncio
import gc
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contenders import EngineContender
from benchmarks.figures import Report
from benchmarks.rounds import Work, interleaved, progress
from benchmarks.server_process import DEADLINE_SECONDS, RunningServer, running_server
from dash_client import AsyncDashClient, DashClient, StreamDelta
from dash_runtime.checkpoints import default_cache_folder, resolve_checkpoint
from dash_runtime.config import EngineConfig, Mode, SkipOptions
from dash_runtime.startup.build import BuildOptions, build_engine
from tests.server.server_harness import FAKE_WORKER, fake_model, write_model_folder

_PROMPT = [104, 101, 108, 108, 111, 32]
_OPTIONS: dict[str, Any] = {"mode": "full_depth", "temperature": 0, "ignore_eos": True, "timeout": DEADLINE_SECONDS}
_READERS = ("threads", "loop", "session_threads", "session_loop", "unary")


class _Streams:
    """Asks for so many answers at once: streams that are read in a thread each or in one event loop, or unary calls.

    The streams are calls of their own, or are all in one session.
    """

    def __init__(self, target: str, count: int, num_tokens: int) -> None:
        self.count = count
        self.num_tokens = num_tokens
        self.num_messages = 0
        self._target = target

    def run(self, reader: str) -> None:
        """Reads all to their ends."""
        is_session = reader.startswith("session_")
        if reader.endswith("threads"):
            sizes = self._in_threads(is_session)
        else:
            sizes = asyncio.run(self._in_a_loop(is_session, is_unary=reader == "unary"))
        assert [sum(own) for own in sizes] == [self.num_tokens] * self.count
        self.num_messages = sum(map(len, sizes))

    def _in_threads(self, is_session: bool) -> list[list[int]]:
        with DashClient(self._target) as client, client.session() as session, ThreadPoolExecutor(self.count) as pool:
            stream = session.stream if is_session else client.stream
            streams = [stream(_PROMPT, max_new_tokens=self.num_tokens, **_OPTIONS) for _ in range(self.count)]
            return list(pool.map(_sizes, streams))

    async def _in_a_loop(self, is_session: bool, is_unary: bool) -> list[list[int]]:
        async with AsyncDashClient(self._target) as client, client.session() as session:
            options = {"max_new_tokens": self.num_tokens, **_OPTIONS}
            if is_unary:
                answers = await asyncio.gather(*(client.generate(_PROMPT, **options) for _ in range(self.count)))
                return [[len(answer.token_ids)] for answer in answers]
            stream = session.stream if is_session else client.stream
            return await asyncio.gather(*(_sizes_async(stream(_PROMPT, **options)) for _ in range(self.count)))


def _sizes(stream: Iterator[StreamDelta]) -> list[int]:
    return [len(delta.token_ids) for delta in stream]


async def _sizes_async(stream: AsyncIterator[StreamDelta]) -> list[int]:
    return [len(delta.token_ids) async for delta in stream]


@contextmanager
def _paced(step_milliseconds: float, variables: Mapping[str, str]) -> Iterator[RunningServer]:
    with tempfile.TemporaryDirectory() as folder:
        model = fake_model(write_model_folder(Path(folder)), token_seconds=step_milliseconds / 1e3)
        with running_server(FAKE_WORKER, DASH_MODEL=model, **variables) as server:
            yield server


def _engine(model: str, num_slots: int, cache_tokens: int) -> EngineContender:
    cache_folder = default_cache_folder(os.environ)
    config = EngineConfig(num_slots=num_slots, cache_tokens=cache_tokens)
    folder = resolve_checkpoint(model, None, cache_folder)
    engine = build_engine(folder, cache_folder, BuildOptions(["cpu"]), config, progress)
    gc.collect()
    gc.freeze()
    return EngineContender(engine, SkipOptions(Mode.FULL_DEPTH))


def measure_wire(
    report: Report, counts: Sequence[int], num_tokens: int, rounds: int, model: str | None, step_milliseconds: float
) -> None:
    """Adds each process's milliseconds of processor time a token, for each number of streams."""
    most, room = max(counts), max(counts) * (num_tokens + 32)
    # What a worker measures while it is idle would disturb the engine here.
    variables = {"DASH_SLOTS": str(most), "DASH_CACHE_TOKENS": str(room), "DASH_CHECK_COSTS": "false"}
    works: dict[str, Work] = {}
    engine = None if model is None else _engine(model, most, room)
    opened = _paced(step_milliseconds, variables) if model is None else running_server(DASH_MODEL=model, **variables)
    with opened as server:
        for count in counts:
            for reader in _READERS:
                streams = _Streams(server.client.target, count, num_tokens)
                works[f"{count}_{reader}"] = _timed(streams, reader, server.pid)
            if engine is not None:
                works[f"{count}_engine"] = _alone(engine, count, num_tokens)
        values = interleaved(report, "wire", works, rounds)
    for name, taken in values.items():
        report.add(name, taken)
    for count in counts:
        for reader in _READERS:
            speed = f"tokens_per_second_{count}"
            report.add_ratio(f"served_over_engine_{count}_{reader}", values, f"{speed}_{reader}", f"{speed}_engine")
    report.note(
        f"{num_tokens} tokens a stream at full depth; processor time of the server's process, of its worker and of the "
        "client, whose streams are read by a thread each, or by one event loop, as calls of their own or in one "
        "session; or of unary calls, from one event loop. tokens_per_message counts a stream's deltas"
    )


def _timed(streams: _Streams, reader: str, pid: int) -> Work:
    server = psutil.Process(pid)
    own = f"{streams.count}_{reader}"

    def seconds() -> dict[str, float]:
        (worker,) = server.children()
        times = {"server": server.cpu_times(), "worker": worker.cpu_times()}
        return {who: taken.user + taken.system for who, taken in times.items()} | {"client": time.process_time()}

    def work() -> Mapping[str, float]:
        before, began = seconds(), time.perf_counter()
        streams.run(reader)
        took, after = time.perf_counter() - began, seconds()
        num_tokens = streams.count * streams.num_tokens
        return {
            **{f"{who}_cpu_ms_per_token_{own}": (after[who] - before[who]) / num_tokens * 1e3 for who in before},
            f"tokens_per_message_{own}": num_tokens / streams.num_messages,
            f"tokens_per_second_{own}": num_tokens / took,
        }

    return work


def _alone(engine: EngineContender, count: int, num_tokens: int) -> Work:
    def work() -> Mapping[str, float]:
        began = time.perf_counter()
        engine.run([_PROMPT] * count, num_tokens)
        return {f"tokens_per_second_{count}_engine": count * num_tokens / (time.perf_counter() - began)}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[64])
    parser.add_argument("--tokens", type=int, default=96, help="of each stream")
    parser.add_argument("--step", type=float, default=10, metavar="MS", help="between the fake worker's steps")
    parser.add_argument("--model", help="a real worker's DASH_MODEL")
    options = parser.parse_args()
    report = Report()
    measure_wire(report, options.streams, options.tokens, options.rounds, options.model, options.step)
    report.print()


if __name__ == "__main__":
    main()
