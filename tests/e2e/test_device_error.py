"""An error of the device in the middle of decoding: the worker ends, and another takes its place."""

import asyncio
import sys
from pathlib import Path

import grpc
import pytest

from tests.e2e.service import cache_of_run
from tests.server.server_harness import running_server
from tests.server.test_lifecycle import code_of, first_delta

# The real worker, whose engine raises what torch raises for a broken device, some steps after it began to serve.
FAILING_WORKER = """
import sys
from dash_runtime.engine.engine import Engine
from dash_server.worker.__main__ import main

step = Engine.step
num_steps = 0

def failing_step(engine):
    global num_steps
    num_steps += any(name != "measured" for name in engine._running)  # not at the start, which measures
    if num_steps == 200:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return step(engine)

Engine.step = failing_step
sys.exit(main(sys.argv[1:]))
"""


async def test_its_requests_end_as_unavailable_and_the_next_worker_serves(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = (sys.executable, "-c", FAILING_WORKER)
    options = {"precision": "float32", "num_threads": 1, "native": "off", "check_costs": False}
    options["cache_folder"] = cache_of_run(tmp_path)
    async with running_server(str(tiny_folder), wait=False, worker_command=command, **options) as server:

        async def until_serving() -> None:
            async with asyncio.timeout(240):
                while not await server.is_serving():
                    await asyncio.sleep(0.05)

        await until_serving()
        calls = [server.stream(text="abc", stopping={"max_new_tokens": 400, "ignore_eos": True}) for _ in range(3)]
        for call in calls:
            await first_delta(call)
        async with asyncio.timeout(20):
            codes = await asyncio.gather(*map(code_of, calls))
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
        assert not await server.is_serving()
        await until_serving()
        answer = await server.generate(text="abc", stopping={"max_new_tokens": 3, "ignore_eos": True})
        assert len(answer.output.token_ids) == 3
        assert server.counts == (0, 0)
    assert "the engine failed, and this worker ends" in capfd.readouterr().err
