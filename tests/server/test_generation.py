"""Good requests over a real socket."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from tests.server.fake_worker import END_TOKEN_ID
from tests.server.server_harness import RunningServer, fake_model, running_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
Chat, Message = common_pb2.ChatPrompt, common_pb2.ChatMessage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model_folder: Path) -> AsyncIterator[RunningServer]:
    async with running_server(fake_model(model_folder), context_length=600, default_compute_budget=0.95) as running:
        yield running


async def test_unary_answer_is_the_concatenated_stream(server: RunningServer) -> None:
    parameters = {"text": "Grüße, 世界! ", "max_new_tokens": 50}
    answer = await server.generate(**parameters)
    events = [event async for event in server.stream(**parameters)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    deltas = [event.delta for event in events[1:-1]]
    assert "".join(delta.text for delta in deltas) == answer.output.text
    assert [id_ for delta in deltas for id_ in delta.token_ids] == answer.output.token_ids
    assert bytes(answer.output.token_ids).decode(errors="replace") == answer.output.text
    for finished in (answer.finished, events[-1].finished):
        assert 0.125 <= finished.usage.queue_seconds < 1  # the worker's 0.125 and a moment in the server
        finished.usage.queue_seconds = 0
    assert answer.finished == events[-1].finished


async def test_several_answers_come_with_their_numbers_and_seeds_of_their_own(server: RunningServer) -> None:
    parameters = {"text": "abc", "max_new_tokens": 5, "n": 3, "sampling": generation_pb2.SamplingParameters(seed=7)}
    first = await server.generate(**parameters)
    answers = [first, *first.others]
    assert [answer.output.text for answer in answers] == ["abcab"] * 3
    assert [answer.started.seed for answer in answers] == [7, 8, 9]
    assert len({answer.started.request_id for answer in answers}) == 3
    events = [event async for event in server.stream(**parameters)]
    for index in range(3):
        own = [event for event in events if event.answer_index == index]
        kinds = [event.WhichOneof("event") for event in own]
        assert (kinds[0], kinds[-1], set(kinds[1:-1])) == ("started", "finished", {"delta"})
        assert "".join(event.delta.text for event in own) == "abcab"
        assert own[0].started.seed == 7 + index
    assert (await server.probe()).num_live == 0


async def test_a_call_for_several_answers_that_is_left_frees_all_slots(server: RunningServer) -> None:
    stream = server.stream(text="abc", max_new_tokens=500, n=3)
    await anext(aiter(stream))
    stream.cancel()
    assert (await server.wait_for_live_requests(0)).num_live == 0


async def test_finished_tells_what_the_worker_told(server: RunningServer) -> None:
    answer = await server.generate(text="ab", max_new_tokens=5)
    finished = answer.finished
    assert finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert not finished.HasField("stop_string")
    assert finished.usage.prompt_token_count == 2
    assert finished.usage.output_token_count == 5
    assert 0.125 <= finished.usage.queue_seconds < 1
    assert finished.usage.prefill_seconds == 0.25
    assert finished.usage.decode_seconds == 0.5
    assert finished.depth.decode_token_count == 4
    assert {count.action: count.count for count in finished.depth.action_counts} == {
        common_pb2.ACTION_SKIP: 1,
        common_pb2.ACTION_INT3: 0,
        common_pb2.ACTION_INT4: 0,
        common_pb2.ACTION_INT8: 0,
        common_pb2.ACTION_FULL: 2,
    }
    (speculative,) = finished.depth.speculative_action_counts
    assert (speculative.action, speculative.count) == (common_pb2.ACTION_INT4, 2)
    assert finished.depth.mean_cost == 0.75


async def test_started_tells_the_defaults_in_use(server: RunningServer) -> None:
    started = (await server.generate(text="abc", max_new_tokens=1)).started
    assert started.prompt_token_count == 3
    assert started.model == "fake"
    assert started.mode == common_pb2.MODE_ADAPTIVE
    assert started.policy == "toy"
    assert started.policy_note == "not a learned policy"
    assert started.compute_budget == 0.95
    assert started.layer_count == 3
    assert len(started.request_id) == 32


async def test_unset_seeds_differ_and_a_set_seed_is_kept(server: RunningServer) -> None:
    seeds = {(await server.generate(text="a", max_new_tokens=1)).started.seed for _ in range(3)}
    assert len(seeds) == 3
    highest = generation_pb2.SamplingParameters(seed=2**64 - 1)
    assert (await server.generate(text="a", max_new_tokens=1, sampling=highest)).started.seed == 2**64 - 1


async def test_default_length_is_what_the_context_has_left(server: RunningServer) -> None:
    assert (await server.generate(text="a")).finished.usage.output_token_count == 256
    assert (await server.generate(text="a" * 590)).finished.usage.output_token_count == 10


ENDINGS: dict[str, tuple[dict[str, Any], str, bytes | list[int], str]] = {
    "end of sequence, in the tokens only": (
        {"text": "hi<|im_end|>", "max_new_tokens": 9},
        "hi",
        [*b"hi", END_TOKEN_ID],
        "END_OF_SEQUENCE",
    ),
    "special tokens are not shown": (
        {"text": "hi<|im_end|>", "max_new_tokens": 6, "stopping": {"ignore_eos": True}},
        "hihi",
        [*b"hi", END_TOKEN_ID] * 2,
        "LENGTH",
    ),
    "stop token, in the tokens only": (
        {"text": "abcd", "stopping": {"stop_token_ids": [ord("c")]}},
        "ab",
        b"abc",
        "STOP_TOKEN",
    ),
    "stop string in the last tokens": (
        {"text": "abcdef", "stop_strings": ("ef",), "max_new_tokens": 6},
        "abcd",
        b"abcdef",
        "STOP_STRING",
    ),
    "half a stop string": (
        {"text": "abcdef", "stop_strings": ("efg",), "max_new_tokens": 6},
        "abcdef",
        b"abcdef",
        "LENGTH",
    ),
    "half a character": ({"text": "a日", "max_new_tokens": 3}, "a\ufffd", "a日".encode()[:3], "LENGTH"),
}


@pytest.mark.parametrize("case", ENDINGS)
async def test_text_tokens_and_reason_at_the_end(server: RunningServer, case: str) -> None:
    parameters, text, token_ids, reason = ENDINGS[case]
    answer = await server.generate(**parameters)
    assert (answer.output.text, list(answer.output.token_ids)) == (text, list(token_ids))
    assert generation_pb2.FinishReason.Name(answer.finished.reason) == f"FINISH_REASON_{reason}"


async def test_stop_string_over_several_tokens_ends_the_text_before_it(server: RunningServer) -> None:
    before = await server.probe()
    answer = await server.generate(text="one two three ", stop_strings=("xyz", "two"), max_new_tokens=200)
    assert answer.output.text == "one "
    assert bytes(answer.output.token_ids) == b"one two"
    assert answer.finished.reason == generation_pb2.FINISH_REASON_STOP_STRING
    assert answer.finished.stop_string == "two"
    after = await server.probe()
    assert (after.num_live, after.num_cancels) == (0, before.num_cancels)


async def test_decisions_and_logprobs_come_with_their_tokens(server: RunningServer) -> None:
    output = generation_pb2.OutputOptions(return_decisions=True, logprobs=2)
    answer = (await server.generate(text="abc", output=output, max_new_tokens=4, stop_strings=("ca",))).output
    assert bytes(answer.token_ids) == b"abca"
    assert answer.actions == bytes([common_pb2.ACTION_FULL]) * 3 * 4
    assert [entry.chosen for entry in answer.logprobs] == [-0.5] * 4
    assert [(top.token_id, top.logprob) for top in answer.logprobs[0].top] == [(0, 0.0), (1, -1.0)]


async def test_prompt_forms_agree_with_tokenize(server: RunningServer) -> None:
    text = "hi <|im_start|>"
    ids = (await server.model.Tokenize(model_pb2.TokenizeRequest(text=text))).token_ids
    assert ids == [*b"hi ", 256]
    prompt = common_pb2.TokenIds(ids=ids)
    assert (await server.generate(token_ids=prompt, max_new_tokens=4)).output.token_ids == ids
    chat = Chat(messages=[Message(role="user", content="hey")])
    ids = (await server.model.Tokenize(model_pb2.TokenizeRequest(chat=chat))).token_ids
    assert ids == [256, *b"user\nhey", 257, 10, 256, *b"assistant\n"]
    assert (await server.generate(chat=chat, max_new_tokens=1)).started.prompt_token_count == len(ids)


@pytest.mark.alone  # beside busy tests the worker may be the slow one
async def test_a_slow_reader_gets_several_tokens_in_a_message(server: RunningServer) -> None:
    call = server.stream(text="x" * 80, max_new_tokens=500)
    deltas = [event.delta for event in [event async for event in call][1:-1]]
    assert len(deltas) < 500
    assert sum(len(delta.token_ids) for delta in deltas) == 500


async def test_model_facts(server: RunningServer) -> None:
    model = await server.model.GetModel(model_pb2.GetModelRequest())
    assert model.name == "fake"
    assert (model.layer_count, model.vocabulary_size, model.context_length) == (3, 260, 600)
    assert (model.max_new_tokens_limit, model.default_max_new_tokens) == (4096, 256)
    assert model.actions == [common_pb2.ACTION_SKIP, common_pb2.ACTION_INT8, common_pb2.ACTION_FULL]
    assert model.modes == [getattr(common_pb2, f"MODE_{name}") for name in ("FULL_DEPTH", "ADAPTIVE", "EXACT", "FIXED")]
    assert model.policy_names == ["toy", "learned"]
    assert model.default_policy_name == "toy"


async def test_policy_facts(server: RunningServer) -> None:
    default = await server.model.GetPolicy(model_pb2.GetPolicyRequest())
    assert (default.name, default.learned, default.lowest_budget) == ("toy", False, 0.9)
    learned = await server.model.GetPolicy(model_pb2.GetPolicyRequest(name="learned"))
    assert learned.learned
    assert learned.pinned_layers == [0, 2]
    assert {cost.action: cost.cost for cost in learned.action_costs} == {1: 0.1, 3: 0.5, 4: 1.0}


async def test_reflection_lists_the_services(server: RunningServer) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {"dash_api.v1.GenerationService", "dash_api.v1.ModelService", "grpc.health.v1.Health"} <= names
