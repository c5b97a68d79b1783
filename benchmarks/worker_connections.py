"""`python -m benchmarks.worker_connections`: tokens per second from a worker over TCP, against the socket pair.

The tests' fake worker gives tokens as fast as it can, so that the connection's share is as large as it gets: to the
server's link alone, or with `--served` through a whole server and gRPC to clients in the same process. Rounds take
turns. Knows no model.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from dash_runtime.config import GenerationRequest, StoppingParameters
from dash_server.settings import Settings
from dash_server.worker.flush import Flush
from dash_server.worker.link import LinkEvents, WorkerLink
from dash_server.worker.messages import Ready
from dash_server.worker.outbox import Outbox
from dash_server.worker.process import LocalStarter
from dash_server.worker.starter import WorkerStarter
from tests.server import fake_worker
from tests.server.server_harness import RunningServer, fake_model, running_server, write_model_folder
from tests.server.tcp_starter import TcpStarter

Contender = Callable[[int, int], Awaitable[None]]
"""Runs so many streams of so many tokens."""


async def _nothing(ready: Ready) -> None:
    pass


@asynccontextmanager
async def _link(starter: WorkerStarter, settings: Settings) -> AsyncIterator[Contender]:
    events = LinkEvents(_nothing, lambda: None, lambda *_: None, lambda _: None, lambda _: None)
    link = WorkerLink(
        starter,
        settings.worker_config(),
        events,
        flush=Flush(0),
        start_timeout_seconds=60,
        silence_timeout_seconds=60,
    )
    running = asyncio.create_task(link.run())
    await link.wait_ready()
    try:
        yield partial(_read_from_link, link)
    finally:
        running.cancel()
        await asyncio.wait([running])
        await starter.close()


async def _read_from_link(link: WorkerLink, num_streams: int, num_tokens: int) -> None:
    outboxes = [Outbox(f"request {number}") for number in range(num_streams)]
    for outbox in outboxes:
        stopping = StoppingParameters(num_tokens, ignore_eos=True)
        link.submit(GenerationRequest(outbox.request_id, [1, 2, 3], stopping), outbox)
    await asyncio.gather(*map(_read_outbox, outboxes))


async def _read_outbox(outbox: Outbox) -> None:
    while (await outbox.take(256)).finished is None:
        pass


@asynccontextmanager
async def _server(starter: WorkerStarter, settings: Settings) -> AsyncIterator[Contender]:
    given = settings.model_dump(include={"slots", "cache_tokens"})
    async with running_server(settings.model, starter=starter, **given) as server:
        yield partial(_read_from_server, server)


async def _read_from_server(server: RunningServer, num_streams: int, num_tokens: int) -> None:
    async def read() -> None:
        async for _ in server.stream(text="abc", max_new_tokens=num_tokens):
            pass

    await asyncio.gather(*(read() for _ in range(num_streams)))


async def measure(num_rounds: int, num_streams: int, num_tokens: int, is_served: bool) -> None:
    """Prints both speeds and the ratio of each round's."""
    opened = _server if is_served else _link
    with tempfile.TemporaryDirectory() as folder:
        model = fake_model(write_model_folder(Path(folder)))
        settings = Settings(model=model, slots=num_streams, cache_tokens=num_streams * (num_tokens + 3))
        pair = LocalStarter((sys.executable, fake_worker.__file__))
        tcp = TcpStarter((fake_worker.__file__,))
        async with opened(pair, settings) as over_pair, opened(tcp, settings) as over_tcp:
            contenders = {"socket pair": over_pair, "TCP": over_tcp}
            speeds: dict[str, list[float]] = {name: [] for name in contenders}
            for number in range(num_rounds + 1):
                for name in sorted(contenders, reverse=number % 2 == 0):
                    started = time.perf_counter()
                    await contenders[name](num_streams, num_tokens)
                    if number:  # the first round warms up
                        speeds[name].append(num_streams * num_tokens / (time.perf_counter() - started))
    for name, values in speeds.items():
        print(f"{name:<12} {_summary(values, ',.0f')} tokens/s")
    ratios = [tcp_speed / pair_speed for pair_speed, tcp_speed in zip(*speeds.values(), strict=True)]
    print(f"{'ratio':<12} {_summary(ratios, '.3f')}, {num_rounds} rounds, {num_streams} streams")


def _summary(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} (quartiles {low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker_connections", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--served", action="store_true", help="through a whole server and gRPC")
    options = parser.parse_args()
    asyncio.run(measure(options.rounds, options.streams, options.tokens, options.served))


if __name__ == "__main__":
    main()
