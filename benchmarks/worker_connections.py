"""`python -m benchmarks.worker_connections`: tokens per second from a worker over TCP, against the socket pair.

The tests' fake worker gives tokens as fast as it can, to a link as the server's, so that the connection's share is as
large as it gets. Rounds take turns. Knows no model and no gRPC.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from dash_runtime.config import GenerationRequest, StoppingParameters
from dash_server.settings import Settings
from dash_server.worker.link import LinkEvents, WorkerLink
from dash_server.worker.messages import Ready
from dash_server.worker.outbox import Outbox
from dash_server.worker.process import LocalStarter
from dash_server.worker.starter import WorkerStarter
from tests.server import fake_worker
from tests.server.server_harness import fake_model, write_model_folder
from tests.server.tcp_starter import TcpStarter


async def _nothing(ready: Ready) -> None:
    pass


@asynccontextmanager
async def _running_link(starter: WorkerStarter, settings: Settings) -> AsyncIterator[WorkerLink]:
    events = LinkEvents(_nothing, lambda: None, lambda *_: None, lambda _: None, lambda _: None)
    link = WorkerLink(starter, settings.worker_config(), events, start_timeout_seconds=60, silence_timeout_seconds=60)
    running = asyncio.create_task(link.run())
    await link.wait_ready()
    try:
        yield link
    finally:
        running.cancel()
        await asyncio.wait([running])
        await starter.close()


async def _tokens_per_second(link: WorkerLink, num_streams: int, num_tokens: int) -> float:
    outboxes = [Outbox(f"request {number}") for number in range(num_streams)]
    started = time.perf_counter()
    for outbox in outboxes:
        stopping = StoppingParameters(num_tokens, ignore_eos=True)
        link.submit(GenerationRequest(outbox.request_id, [1, 2, 3], stopping), outbox)
    await asyncio.gather(*map(_read, outboxes))
    return num_streams * num_tokens / (time.perf_counter() - started)


async def _read(outbox: Outbox) -> None:
    while (await outbox.take(256)).finished is None:
        pass


async def measure(num_rounds: int, num_streams: int, num_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = fake_model(write_model_folder(Path(folder)))
        settings = Settings(model=model, slots=num_streams, cache_tokens=num_streams * (num_tokens + 3))
        pair = LocalStarter((sys.executable, fake_worker.__file__))
        tcp = TcpStarter((fake_worker.__file__,))
        async with _running_link(pair, settings) as local, _running_link(tcp, settings) as remote:
            speeds: dict[WorkerLink, list[float]] = {local: [], remote: []}
            for number in range(num_rounds + 1):
                turns = (local, remote) if number % 2 else (remote, local)
                for link in turns:
                    speed = await _tokens_per_second(link, num_streams, num_tokens)
                    if number:  # the first round warms up
                        speeds[link].append(speed)
    for name, link in (("socket pair", local), ("TCP", remote)):
        print(f"{name:<12} {_summary(speeds[link], ',.0f')} tokens/s")
    ratios = [over_tcp / over_pair for over_pair, over_tcp in zip(speeds[local], speeds[remote], strict=True)]
    print(f"{'ratio':<12} {_summary(ratios, '.3f')}, {num_rounds} rounds, {num_streams} streams")


def _summary(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} (quartiles {low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker_connections", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    options = parser.parse_args()
    asyncio.run(measure(options.rounds, options.streams, options.tokens))


if __name__ == "__main__":
    main()
