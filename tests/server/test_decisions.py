"""GetDecisions of a real server with the fake worker, and what GetAudit has in common with it."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from dash_api.v1 import common_pb2, model_pb2
from tests.server.refusals import refusal
from tests.server.server_harness import RunningServer, bearer, fake_model, running_server, write_tokens

ADA, BOB = "a-token-of-ada-s-own", "a-token-of-bob-s-own"


async def decisions(server: RunningServer, request_id: str, token: str | None = None) -> model_pb2.GetDecisionsResponse:
    request = model_pb2.GetDecisionsRequest(request_id=request_id)
    return await server.model.GetDecisions(request, metadata=bearer(token))


async def audit(server: RunningServer, request_id: str, token: str | None = None) -> model_pb2.GetAuditResponse:
    request = model_pb2.GetAuditRequest(request_id=request_id)
    return await server.model.GetAudit(request, metadata=bearer(token))


BOTH = pytest.mark.parametrize(("ask", "reason"), [(decisions, "DECISIONS_NOT_FOUND"), (audit, "AUDIT_NOT_FOUND")])


async def request_id_of(server: RunningServer, token: str | None = None) -> str:
    answer = await server.generate(text="hello", max_new_tokens=6, token=token)
    return answer.started.request_id


async def test_the_caller_is_told_what_was_decided(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, num_layers=5), trace_steps=4) as server:
        request_id = await request_id_of(server)
        answer = await decisions(server, request_id)
    assert (answer.request_id, answer.model, answer.policy) == (request_id, "fake", "toy")
    assert answer.mode == common_pb2.MODE_ADAPTIVE
    assert answer.price_of_compute == 0.75
    assert (answer.layer_count, list(answer.pinned_layers)) == (5, [0, 2])
    assert list(answer.score_actions) == [common_pb2.ACTION_SKIP, common_pb2.ACTION_INT8, common_pb2.ACTION_FULL]
    assert (len(answer.steps), answer.unrecorded_step_count) == (4, 1)
    for step, token_id in zip(answer.steps, b"ello", strict=True):
        assert step.kind == model_pb2.STEP_KIND_DECODE
        assert list(step.token_ids) == [token_id]
        assert step.start_unix_nanos > 1_600_000_000 * 10**9
        full, int8 = common_pb2.ACTION_FULL, common_pb2.ACTION_INT8  # not the runtime's numbers
        assert step.actions == bytes([full, int8, full, int8, int8])
        assert [end > 0 for end in step.decision_end_nanos] == [False, True, False, True, True]
        assert all(end <= step.duration_nanos for end in step.layer_end_nanos)
        assert list(step.scores[3:6]) == [1.0, 0.5, -1.0]
        assert len(step.cost_spent) == len(step.exposed_nanos) == len(step.layer_start_nanos) == 5
        assert not step.HasField("accepted_token_count")


@BOTH
async def test_another_callers_request_looks_like_none(
    model_folder: Path, tmp_path: Path, ask: Any, reason: str
) -> None:
    tokens = write_tokens(tmp_path, ada=ADA, bob=BOB)
    async with running_server(fake_model(model_folder), token_file=tokens) as server:
        request_id = await request_id_of(server, ADA)
        assert (await ask(server, request_id, ADA)).request_id == request_id
        of_another = await refusal(ask(server, request_id, BOB))
        of_nobody = await refusal(ask(server, "no such request", ADA))
        assert (await refusal(ask(server, request_id))).code is grpc.StatusCode.UNAUTHENTICATED
    assert of_another.code is of_nobody.code is grpc.StatusCode.NOT_FOUND
    assert of_another.message == of_nobody.message
    assert of_another.reason == reason


async def test_no_request_id_is_a_wrong_field(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        assert (await refusal(decisions(server, ""))).fields == ["request_id"]


@BOTH
@pytest.mark.parametrize("num_kept", [0, 2])
async def test_only_the_last_requests_are_kept(model_folder: Path, num_kept: int, ask: Any, reason: str) -> None:
    async with running_server(fake_model(model_folder), recent_requests=num_kept) as server:
        for place, request_id in enumerate([await request_id_of(server) for _ in range(3)]):
            if place >= 3 - num_kept:
                assert (await ask(server, request_id)).request_id == request_id
            else:
                assert (await refusal(ask(server, request_id))).reason == reason


async def test_a_cancelled_request_is_kept_as_far_as_it_came(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01)) as server:
        call = server.stream(text="hello", max_new_tokens=4000)
        request_id = (await call.read()).started.request_id
        for _ in range(3):
            await call.read()
        call.cancel()
        async with asyncio.timeout(30):
            while True:
                try:
                    answer = await decisions(server, request_id)
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.02)
    assert len(answer.steps) >= 2
