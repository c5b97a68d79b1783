"""Sends SIGTERM while many streams run, and reads one message a second."""

import asyncio
import signal
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

from benchmarks.soak.callers import Sessions
from benchmarks.soak.report import Finding, finding
from benchmarks.soak.service import Service, running_service
from dash_api.v1 import generation_pb2
from tests.server.server_harness import FAKE_WORKER, fake_model, generation_request, write_model_folder

_TOKENS = 64


async def run_drain(num_streams: int = 32) -> list[Finding]:
    """Runs the embedded model. Half of the streams are one session's; half wait for a slot when the signal comes."""
    with tempfile.TemporaryDirectory() as folder:
        async with running_service(Path(folder), shutdown_grace_seconds=120) as service:
            stopping = generation_pb2.StoppingParameters(max_new_tokens=_TOKENS, ignore_eos=True)
            parameters = generation_request(text="Once upon a time", stopping=stopping).parameters
            sessions, has_begun = Sessions(service), asyncio.Event()

            async def last_message(source: Service | Sessions) -> generation_pb2.StreamGenerateResponse:
                last = generation_pb2.StreamGenerateResponse()
                async for message in source.stream(parameters):
                    has_begun.set()
                    last = message
                return last

            streams = [asyncio.create_task(last_message(own)) for own in (service, sessions) * (num_streams // 2)]
            await has_begun.wait()
            await asyncio.sleep(0.5)  # until all have arrived
            service.server.process.send_signal(signal.SIGTERM)
            ends = await asyncio.gather(*streams, return_exceptions=True)
            code, log = await asyncio.to_thread(service.server.outcome, 60.0)
    num_complete = sum(
        not isinstance(end, BaseException) and end.finished.usage.output_token_count == _TOKENS for end in ends
    )
    return [
        finding(f"streams of {num_streams} that were complete after SIGTERM", str(num_streams), num_complete,
                num_complete == num_streams),
        finding("exit code", "0", code, code == 0 and "Traceback" not in log),
    ]  # fmt: skip


async def run_slow_reader(seconds: float = 60) -> list[Finding]:
    """Runs a worker that produces 200 tokens a second, each with 30 layers' decisions, and a client that reads one
    message a second."""
    with tempfile.TemporaryDirectory() as folder:
        model = fake_model(write_model_folder(Path(folder) / "model"), token_seconds=0.005, num_layers=30)
        variables = {"model": model, "context_length": 40_000, "cache_tokens": 40_000, "max_new_tokens": 40_000}
        async with running_service(Path(folder), worker_command=FAKE_WORKER, **variables) as service:
            output = generation_pb2.OutputOptions(return_decisions=True)
            parameters = generation_request(text="abc", max_new_tokens=39_000, output=output).parameters
            sizes: list[int] = []
            num_tokens = 0
            until = time.monotonic() + seconds
            async with aclosing(service.stream(parameters)) as stream:
                async for message in stream:
                    num_tokens += len(message.delta.token_ids)
                    sizes.append(service.rss_bytes())
                    await asyncio.sleep(1)
                    if time.monotonic() > until:
                        break
    settled = sizes[2:]
    growth = max(settled) / settled[0] - 1
    return [
        finding(f"memory while a client read {len(sizes)} messages in {seconds:g} s", "flat, < 3 %",
                f"{growth:+.1%}, {num_tokens} tokens in them", growth < 0.03),
    ]  # fmt: skip
