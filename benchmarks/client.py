"""`python -m benchmarks.client`: measures what the Python client costs. Needs no model, but minutes, and pip a network.

CPU times are of this process alone. Other work on the machine still disturbs them a little: leave it idle.
"""

import argparse
import asyncio
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc

from benchmarks.figures import Report, machine
from benchmarks.rounds import interleaved, progress
from dash_api.v1 import generation_pb2, generation_pb2_grpc
from dash_client import AsyncDashClient, DashClient

_MESSAGES_PER_SECOND = 1_000
_NUM_STREAMS = 1_000
_ROOT = Path(__file__).resolve().parent.parent
_IMPORT = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import dash_client
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


@contextmanager
def _paced_server(messages_per_second: float, count: int) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.paced_server", str(messages_per_second), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as server:
        try:
            assert server.stdout is not None
            yield f"127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


def measure_import(report: Report, runs: int) -> None:
    """Times `import dash_client` in fresh processes. The first one fills the caches and is not counted."""
    progress("import")
    times = []
    for _ in range(runs + 1):
        run = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, check=True, text=True)
        times.append([float(value) for value in run.stdout.split()])
    report.add("import_seconds", [wall for wall, _ in times[1:]], "≤ 0.3")
    report.add("import_cpu_seconds", [cpu for _, cpu in times[1:]])


def measure_size(report: Report) -> None:
    """Adds up the files that `pip install dash-llm` installs, compiled bytecode included."""
    progress("installed size: pip install into a new environment")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder) / "bin" / "python"
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", str(_ROOT)], check=True
        )
        size = sum(path.lstat().st_size for path in Path(folder, "lib").rglob("*") if path.is_file())
    report.add("installed_megabytes", [size / 1e6], "≤ 60")


def measure_overhead(report: Report, rounds: int, count: int) -> None:
    """Measures CPU time per message of the client and of bare stubs that read the same stream, in many short turns.

    Most of it is waking up, whose cost varies by a tenth between turns. Only many turns can resolve a few per cent.
    """
    with _paced_server(_MESSAGES_PER_SECOND, count) as target:

        def per_message(name: str, drain: Callable[[], int]) -> Callable[[], Mapping[str, float]]:
            def work() -> Mapping[str, float]:
                gc.collect()
                began = time.process_time()
                characters = drain()
                seconds = time.process_time() - began
                assert characters == count * len(" word")
                return {name: seconds / count}

            return work

        with grpc.insecure_channel(target) as channel, DashClient(target) as client, asyncio.Runner() as runner:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)

            async def open_async() -> tuple[AsyncDashClient, grpc.aio.Channel]:
                return AsyncDashClient(target), grpc.aio.insecure_channel(target)

            async_client, async_channel = runner.run(open_async())
            async_stub = generation_pb2_grpc.GenerationServiceStub(async_channel)
            works = {
                "stub": per_message("stub", lambda: _drain_stub(stub)),
                "client": per_message("client", lambda: _drain_client(client)),
                "async_stub": per_message("async_stub", lambda: runner.run(_drain_async_stub(async_stub))),
                "async_client": per_message("async_client", lambda: runner.run(_drain_async_client(async_client))),
            }
            values = interleaved(report, "overhead", works, rounds)
            runner.run(async_client.close())
            runner.run(async_channel.close())
    for prefix in ("", "async_"):
        for name in (f"{prefix}stub", f"{prefix}client"):
            report.add(f"{name}_cpu_microseconds_per_message", [1e6 * value for value in values.get(name, [])])
        report.add(f"{prefix}client_overhead", _overheads(values, f"{prefix}client", f"{prefix}stub"), "≤ 0.05")


def _overheads(values: Mapping[str, list[float]], upper: str, lower: str) -> list[float]:
    """Returns the overhead of the medians in each third of the turns: single turns differ by more than the overhead."""
    pairs = list(zip(values.get(upper, []), values.get(lower, []), strict=True))
    size = len(pairs) // 3
    thirds = [pairs[begin : begin + size] for begin in range(0, 3 * size, size)] if size else []
    return [
        statistics.median(own for own, _ in third) / statistics.median(bare for _, bare in third) - 1
        for third in thirds
    ]


def _request() -> generation_pb2.StreamGenerateRequest:
    return generation_pb2.StreamGenerateRequest(parameters=generation_pb2.GenerationParameters(text="x"))


def _drain_stub(stub: generation_pb2_grpc.GenerationServiceStub) -> int:
    texts, token_ids = [], []
    for message in stub.StreamGenerate(_request()):
        if message.WhichOneof("event") == "delta":
            texts.append(message.delta.text)
            token_ids.extend(message.delta.token_ids)
    return len("".join(texts))


def _drain_client(client: DashClient) -> int:
    stream = client.stream("x")
    for _ in stream:
        pass
    return len(stream.final().text)


async def _drain_async_stub(stub: generation_pb2_grpc.GenerationServiceStub) -> int:
    texts, token_ids = [], []
    async for message in stub.StreamGenerate(_request()):
        if message.WhichOneof("event") == "delta":
            texts.append(message.delta.text)
            token_ids.extend(message.delta.token_ids)
    return len("".join(texts))


async def _drain_async_client(client: AsyncDashClient) -> int:
    stream = client.stream("x")
    async for _ in stream:
        pass
    return len((await stream.final()).text)


def measure_abandoned(report: Report, runs: int) -> None:
    """Times how long the server takes to cancel a request whose stream was left in mid-loop, without closing it."""
    progress("abandoned streams")
    times: dict[str, list[float]] = {"abandoned_seconds": [], "async_abandoned_seconds": []}
    with _paced_server(_MESSAGES_PER_SECOND, 1) as target, DashClient(target) as client:

        def until_cancelled(number: int) -> float:
            began = time.perf_counter()
            while client.tokenize("x") != (number,):
                time.sleep(0.001)
            return time.perf_counter() - began

        async def abandon(number: int) -> float:
            async with AsyncDashClient(target) as async_client:
                async for _ in async_client.stream("wait"):
                    break
                return await asyncio.to_thread(until_cancelled, number)

        for run in range(runs):
            for _ in client.stream("wait"):
                break
            times["abandoned_seconds"].append(until_cancelled(2 * run + 1))
            times["async_abandoned_seconds"].append(asyncio.run(abandon(2 * run + 2)))
    for name, values in times.items():
        report.add(name, values, "≤ 1")


def measure_many(report: Report) -> None:
    """Times many simultaneous streams of one async client, each of ten messages."""
    progress(f"{_NUM_STREAMS} streams")

    async def run(target: str) -> float:
        async with AsyncDashClient(target, timeout=120) as client:
            began = time.perf_counter()
            answers = await asyncio.gather(*(client.stream("x").final() for _ in range(_NUM_STREAMS)))
            assert all(len(answer.token_ids) == 10 for answer in answers)
            return time.perf_counter() - began

    with _paced_server(2, 10) as target:
        report.add(f"{_NUM_STREAMS}_streams_of_5_seconds", [asyncio.run(run(target))])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and no installation")
    quick = parser.parse_args().quick
    report = Report()
    measure_import(report, 3 if quick else 11)
    measure_overhead(report, 6 if quick else 45, 500)
    measure_abandoned(report, 3 if quick else 9)
    measure_many(report)
    if not quick:
        with report.attempt("installed size"):
            measure_size(report)
    print(machine())
    print(f"load average of the last minute: {os.getloadavg()[0]:.1f}")
    print("\n".join([*(figure.line() for figure in report.figures), *report.notes]))


if __name__ == "__main__":
    main()
