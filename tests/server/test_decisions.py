"""GetDecisions of a real server with the fake worker."""

import asyncio
from pathlib import Path

import grpc
import pytest

from dash_api.v1 import common_pb2, model_pb2
from dash_runtime.actions import Action
from tests.server.server_harness import (
    RunningServer,
    bearer,
    error_details,
    fake_model,
    running_server,
    violated_fields,
)

TOKENS = {"ada": "a-token-of-ada-s-own", "bob": "a-token-of-bob-s-own"}


async def decisions(server: RunningServer, request_id: str, token: str | None = None) -> model_pb2.GetDecisionsResponse:
    request = model_pb2.GetDecisionsRequest(request_id=request_id)
    return await server.model.GetDecisions(request, metadata=bearer(token))


async def refusal(server: RunningServer, request_id: str, token: str | None = None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await decisions(server, request_id, token)
    return failure.value


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
        assert step.actions == bytes([Action.FULL, Action.INT8, Action.FULL, Action.INT8, Action.INT8])
        assert [end > 0 for end in step.decision_end_nanos] == [False, True, False, True, True]
        assert all(end <= step.duration_nanos for end in step.layer_end_nanos)
        assert list(step.scores[3:6]) == [1.0, 0.5, -1.0]
        assert len(step.cost_spent) == len(step.exposed_nanos) == len(step.layer_start_nanos) == 5
        assert not step.HasField("accepted_token_count")


async def test_another_callers_request_looks_like_none(model_folder: Path, tmp_path: Path) -> None:
    token_file = tmp_path / "tokens.toml"
    token_file.write_text("".join(f'[{name}]\ntoken = "{token}"\n' for name, token in TOKENS.items()))
    async with running_server(fake_model(model_folder), token_file=token_file) as server:
        request_id = await request_id_of(server, TOKENS["ada"])
        assert len((await decisions(server, request_id, TOKENS["ada"])).steps) == 5
        of_another = await refusal(server, request_id, TOKENS["bob"])
        of_nobody = await refusal(server, "no such request", TOKENS["ada"])
        assert (await refusal(server, request_id)).code() is grpc.StatusCode.UNAUTHENTICATED
    assert of_another.code() is of_nobody.code() is grpc.StatusCode.NOT_FOUND
    assert of_another.details() == of_nobody.details()
    assert error_details(of_another)[1]["ErrorInfo"].reason == "DECISIONS_NOT_FOUND"


async def test_no_request_id_is_a_wrong_field(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        assert violated_fields(await refusal(server, "")) == ["request_id"]


async def test_only_the_last_requests_are_kept(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), recent_requests=2) as server:
        first, *others = [await request_id_of(server) for _ in range(3)]
        assert (await refusal(server, first)).code() is grpc.StatusCode.NOT_FOUND
        for request_id in others:
            assert (await decisions(server, request_id)).request_id == request_id
    async with running_server(fake_model(model_folder), recent_requests=0) as server:
        assert (await refusal(server, await request_id_of(server))).code() is grpc.StatusCode.NOT_FOUND


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
