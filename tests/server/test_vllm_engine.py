"""The service that the SMG gateway speaks, over a real socket, with the fake worker."""

import asyncio
import hashlib
import io
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

pytest.importorskip("smg_grpc_proto", reason="needs the extra smg")

from smg_grpc_proto.generated import common_pb2 as smg_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb2
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as vllm_grpc

from dash_api.v1 import common_pb2, generation_pb2
from dash_runtime.errors import InvalidRequest
from dash_server.vllm_requests import parameters_of
from tests.server.fake_worker import END_TOKEN_ID
from tests.server.refusals import refusal
from tests.server.server_harness import RunningServer, bearer, fake_model, running_server, write_tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")


def request(
    text: str = "", is_streamed: bool = False, request_id: str = "r", **params: Any
) -> vllm_pb2.GenerateRequest:
    ids = vllm_pb2.TokenizedInput(input_ids=list(text.encode())) if text else None
    sampling = vllm_pb2.SamplingParams(**params)
    return vllm_pb2.GenerateRequest(request_id=request_id, tokenized=ids, sampling_params=sampling, stream=is_streamed)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model_folder: Path) -> AsyncIterator[RunningServer]:
    model = fake_model(model_folder, token_seconds=0.001)
    async with running_server(model, context_length=600, max_new_tokens=500, vllm_engine=True) as running:
        yield running


@pytest.fixture
def engine(server: RunningServer) -> Any:
    return vllm_grpc.VllmEngineStub(server.channel)


async def answers(engine: Any, asked: vllm_pb2.GenerateRequest) -> list[vllm_pb2.GenerateResponse]:
    return [response async for response in engine.Generate(asked)]


async def test_an_answer_is_whole_or_in_pieces(engine: Any) -> None:
    (whole,) = await answers(engine, request("abc", max_tokens=5))
    assert bytes(whole.complete.output_ids) == b"abcab"
    assert (whole.complete.finish_reason, whole.complete.prompt_tokens, whole.complete.completion_tokens) == (
        "length",
        3,
        5,
    )
    *chunks, last = await answers(engine, request("abc", is_streamed=True, max_tokens=5, logprobs=2))
    assert bytes(id_ for piece in chunks for id_ in piece.chunk.token_ids) == b"abcab"
    assert sum(piece.chunk.completion_tokens for piece in chunks) == 5
    assert {len(piece.chunk.output_logprobs.top_logprobs[0].values) for piece in chunks} == {2}
    assert (list(last.complete.output_ids), last.complete.finish_reason) == ([], "length")


async def test_an_end_is_a_stop_and_a_stop_string_is_named(engine: Any) -> None:
    ended = request(max_tokens=9)
    ended.tokenized.input_ids.extend([*b"ab", END_TOKEN_ID])
    (whole,) = await answers(engine, ended)
    assert (whole.complete.finish_reason, list(whole.complete.output_ids)) == ("stop", [*b"ab", END_TOKEN_ID])
    (stopped,) = await answers(engine, request("abcd", max_tokens=9, stop=["cd"]))
    assert (stopped.complete.finish_reason, stopped.complete.matched_stop_str) == ("stop", "cd")


async def test_several_answers_come_with_their_numbers(engine: Any) -> None:
    responses = await answers(engine, request("ab", is_streamed=True, max_tokens=4, n=3))
    ended = [response.complete.index for response in responses if response.HasField("complete")]
    assert sorted(ended) == [0, 1, 2]
    for index in range(3):
        chunks = [response.chunk for response in responses if response.HasField("chunk")]
        assert bytes(id_ for piece in chunks if piece.index == index for id_ in piece.token_ids) == b"abab"


async def test_an_aborted_answer_ends_and_its_slot_is_free(server: RunningServer, engine: Any) -> None:
    call = engine.Generate(request("abc", is_streamed=True, request_id="long", max_tokens=500))
    await anext(aiter(call))
    await engine.Abort(vllm_pb2.AbortRequest(request_ids=["long", "unknown"]))
    *_, last = [response async for response in call]
    assert last.complete.finish_reason == "abort"
    assert (await server.probe()).num_live == 0


async def test_an_answer_is_aborted_while_a_piece_waits_for_its_reader(server: RunningServer, engine: Any) -> None:
    little = [("grpc.http2.lookahead_bytes", 256), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=little) as channel:
        own = request("abc", is_streamed=True, request_id="slow", max_tokens=500, logprobs=20)
        call = vllm_grpc.VllmEngineStub(channel).Generate(own)
        await anext(aiter(call))
        await server.wait_for_live_requests(0)  # all tokens are made
        await engine.Abort(vllm_pb2.AbortRequest(request_ids=["slow"]))
        async with asyncio.timeout(30):
            *_, last = [response async for response in call]
    assert last.complete.finish_reason == "abort"


async def test_a_call_that_is_left_frees_its_slots(server: RunningServer, engine: Any) -> None:
    call = engine.Generate(request("abc", is_streamed=True, max_tokens=500, n=2))
    await anext(aiter(call))
    call.cancel()
    assert (await server.wait_for_live_requests(0)).num_live == 0


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"min_tokens": 3}, "sampling_params.min_tokens"),
        ({"prompt_logprobs": 1}, "sampling_params.prompt_logprobs"),
        ({"n": 17}, "n"),
        ({"n": 2**32 - 1}, "sampling_params.n"),
        ({"max_tokens": 2**31}, "sampling_params.max_tokens"),
        ({"structural_tag": "{}"}, "sampling_params.structural_tag"),
        ({"grammar": 'root ::= "a'}, "sampling_params.grammar"),
        ({"logit_bias": {-1: 1.0}}, "sampling_params.logit_bias[-1]"),
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"max_tokens": 501}, "stopping.max_new_tokens"),
        ({"json_schema": "{"}, "constraint.json_schema"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_field(engine: Any, params: dict[str, Any], field: str) -> None:
    refused = await refusal(answers(engine, request("abc", **params)))
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_the_gateway_learns_the_model_the_load_and_the_tokenizer(
    server: RunningServer, engine: Any, model_folder: Path
) -> None:
    info = await engine.GetModelInfo(vllm_pb2.GetModelInfoRequest())
    assert (info.served_model_name, info.max_context_length, list(info.eos_token_ids)) == ("fake", 600, [END_TOKEN_ID])
    assert (await engine.HealthCheck(vllm_pb2.HealthCheckRequest())).healthy
    (load,) = (await engine.GetLoads(vllm_pb2.GetLoadsRequest())).loads
    assert load.max_running_requests == (await engine.GetServerInfo(vllm_pb2.GetServerInfoRequest())).max_num_seqs > 0
    chunks = [chunk async for chunk in engine.GetTokenizer(smg_pb2.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as files:
        assert files.read("tokenizer.json") == (model_folder / "tokenizer.json").read_bytes()
        assert "chat_template.jinja" in files.namelist()
    assert (await refusal(engine.Embed(vllm_pb2.EmbedRequest()))).code is grpc.StatusCode.UNIMPLEMENTED


async def test_tokens_and_limits_hold_here_too(model_folder: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, gateway="gateway-s-token-long-enough")
    model = fake_model(model_folder, token_seconds=0.01)
    async with running_server(model, vllm_engine=True, token_file=tokens, slots=1, max_queue=0) as running:
        engine = vllm_grpc.VllmEngineStub(running.channel)
        for call in (engine.GetModelInfo(vllm_pb2.GetModelInfoRequest()), answers(engine, request("abc"))):
            assert (await refusal(call)).code is grpc.StatusCode.UNAUTHENTICATED
        metadata = bearer("gateway-s-token-long-enough")
        first = engine.Generate(request("abc", is_streamed=True, max_tokens=400), metadata=metadata)
        await anext(aiter(first))
        full = await refusal(engine.Generate(request("abc"), metadata=metadata))
        assert full.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


async def test_an_id_is_its_callers_own_and_may_stand_for_several_requests(model_folder: Path, tmp_path: Path) -> None:
    ann, bob = "ann-s-token-which-is-long-enough", "bob-s-token-which-is-long-enough"
    tokens = write_tokens(tmp_path, ann=ann, bob=bob)
    async with running_server(fake_model(model_folder, token_seconds=0.01), vllm_engine=True, token_file=tokens) as own:
        engine = vllm_grpc.VllmEngineStub(own.channel)
        asked = request("abc", is_streamed=True, request_id="same", max_tokens=400)
        calls = [engine.Generate(asked, metadata=bearer(token)) for token in (ann, ann, bob)]
        for call in calls:
            await anext(aiter(call))
        await engine.Abort(vllm_pb2.AbortRequest(request_ids=["same"]), metadata=bearer(ann))
        for call in calls[:2]:
            *_, last = [response async for response in call]
            assert last.complete.finish_reason == "abort"
        assert (await anext(aiter(calls[2]))).HasField("chunk")
        calls[2].cancel()


def translated(request_id: str = "r", **params: Any) -> generation_pb2.GenerationParameters:
    return parameters_of(request("abc", request_id=request_id, **params))


async def test_defaults_are_those_of_vllm() -> None:
    sampling = translated().sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (1.0, 1.0, 1.0)
    assert translated(temperature=0.0).sampling.temperature == 0
    assert not translated().stopping.HasField("max_new_tokens")
    assert [translated(seed=seed).sampling.seed for seed in (7, -1)] == [7, 2**64 - 1]
    assert not translated().sampling.HasField("seed")
    assert translated(top_k=2**32 - 2).sampling.top_k > 10**9, "all tokens, as there"
    assert (translated(n=3).n, translated(n=0).HasField("n")) == (3, False)
    assert list(translated(truncate_prompt_tokens=2).token_ids.ids) == list(b"bc")
    assert parameters_of(vllm_pb2.GenerateRequest(text="hi")).text == "hi"


async def test_constraints_are_our_own_or_translated() -> None:
    assert translated(json_object=True).constraint.json_schema == '{"type": "object"}'
    assert translated(choice=vllm_pb2.ChoiceConstraint(choices=["a"])).constraint.choices.texts == ["a"]
    assert "start:" in translated(grammar='root ::= "a" | "b"').constraint.lark_grammar
    assert translated(grammar='start: "a"').constraint.lark_grammar == 'start: "a"'
    assert not translated().HasField("constraint")


async def test_modes_and_budgets_stand_in_front_of_the_requests_id() -> None:
    skip = translated("dash:mode=adaptive,compute_budget=0.5,policy_name=p:chatcmpl-1").skip
    assert (skip.mode, skip.compute_budget, skip.policy_name) == (common_pb2.MODE_ADAPTIVE, 0.5, "p")
    fixed = translated("dash:mode=fixed,fixed_action=int4:").skip
    assert (fixed.mode, fixed.fixed_action) == (common_pb2.MODE_FIXED, common_pb2.ACTION_INT4)
    assert translated("dash::x").skip == translated("mode=exact").skip == generation_pb2.SkipOptions()
    for wrong in ("speed=1", "mode=fast", "compute_budget=low", "draft_length=", "mode"):
        with pytest.raises(InvalidRequest) as refused:
            translated(f"dash:{wrong}:x")
        assert refused.value.field == "request_id"


async def test_without_the_setting_the_service_is_not_there(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as running:
        engine = vllm_grpc.VllmEngineStub(running.channel)
        missing = await refusal(asyncio.wait_for(engine.HealthCheck(vllm_pb2.HealthCheckRequest()), 10))
        assert missing.code is grpc.StatusCode.UNIMPLEMENTED
