"""A cancelled or late request gives back its slot and its cache at once, wherever it is, with a real worker.

The cache holds exactly one request of the kind that is cancelled: if any of it were kept, the next would wait for ever.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from dash_api.v1 import common_pb2, generation_pb2
from dash_server.main import WORKER_COMMAND
from tests.e2e.service import cache_of_run
from tests.server.server_harness import RunningServer, running_server
from tests.server.test_lifecycle import code_of, first_delta

pytestmark = pytest.mark.asyncio(loop_scope="module")

_CACHE_TOKENS = 500
FULL_DEPTH = generation_pb2.SkipOptions(mode=common_pb2.MODE_FULL_DEPTH)
# Always drafts, in runs of fifteen: nearly every moment is one of drafting.
EXACT = generation_pb2.SkipOptions(mode=common_pb2.MODE_EXACT, compute_budget=1.0, draft_length=15)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServer]:
    settings = {
        "slots": 2,
        "cache_tokens": _CACHE_TOKENS,
        "prefill_chunk_tokens": 1,  # so that a prompt takes hundreds of steps
        "cache_folder": cache_of_run(tmp_path_factory.mktemp("server")),
        "precision": "float32",
        "native": "off",  # eager, which starts sooner
        "check_costs": False,
        "num_threads": 1,  # threads that wait for each other would suffer from whatever runs beside the tests
    }
    async with running_server(str(tiny_folder), wait=False, worker_command=WORKER_COMMAND, **settings) as running:
        async with asyncio.timeout(120):
            while not await running.is_serving():
                await asyncio.sleep(0.1)
        yield running


def whole_cache(server: RunningServer, num_prompt_tokens: int, **options: Any) -> grpc.aio.UnaryStreamCall:
    """A stream that needs all of the cache."""
    stopping = {"max_new_tokens": _CACHE_TOKENS - num_prompt_tokens, "ignore_eos": True}
    prompt = common_pb2.TokenIds(ids=[7] * num_prompt_tokens)
    return server.stream(token_ids=prompt, stopping=stopping, **options)


async def assert_nothing_is_left(server: RunningServer) -> None:
    await server.wait_until_inside(0, 0)
    assert server.server.admission.num_inside == 0
    assert server.server.admission.num_tokens_inside == 0
    call = whole_cache(server, 1, skip=FULL_DEPTH)
    async with asyncio.timeout(30):
        await first_delta(call)
    call.cancel()
    await server.wait_until_inside(0, 0)


async def test_cancel_in_the_queue(server: RunningServer) -> None:
    running = whole_cache(server, 1, skip=FULL_DEPTH)
    await first_delta(running)
    queued = whole_cache(server, 1, skip=FULL_DEPTH)
    await server.wait_until_inside(1, 1)
    queued.cancel()
    await server.wait_until_inside(1, 0)
    running.cancel()
    await assert_nothing_is_left(server)


async def test_cancel_in_the_prompt(server: RunningServer) -> None:
    call = whole_cache(server, 480, skip=FULL_DEPTH)
    assert (await call.read()).HasField("started")  # it has its slot, and hundreds of steps before its first token
    call.cancel()
    await assert_nothing_is_left(server)


async def test_cancel_while_decoding(server: RunningServer) -> None:
    call = whole_cache(server, 1, skip=FULL_DEPTH)
    await first_delta(call)
    call.cancel()
    await assert_nothing_is_left(server)


async def test_cancel_while_drafting(server: RunningServer) -> None:
    for number in range(5):
        call = whole_cache(server, 1, skip=EXACT)
        await first_delta(call)
        await asyncio.sleep(0.01 * number)
        call.cancel()
    await assert_nothing_is_left(server)


@pytest.mark.parametrize(("num_prompt_tokens", "skip"), [(480, FULL_DEPTH), (1, FULL_DEPTH), (1, EXACT)])
async def test_a_deadline_in_the_prompt_or_later(
    server: RunningServer, num_prompt_tokens: int, skip: generation_pb2.SkipOptions
) -> None:
    call = whole_cache(server, num_prompt_tokens, skip=skip, timeout=0.1)
    assert await code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_nothing_is_left(server)
