"""Every kind of bad request gets INVALID_ARGUMENT naming the field, and harms nobody else."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import status_pb2

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from tests.server.open_session import open_session
from tests.server.refusals import refusal
from tests.server.server_harness import RunningServer, fake_model, running_server
from tests.server.test_tools import BAD_TOOLS, CLOCK, USER

pytestmark = pytest.mark.asyncio(loop_scope="module")

Parameters = generation_pb2.GenerationParameters
Sampling = generation_pb2.SamplingParameters
Stopping = generation_pb2.StoppingParameters
Skip = generation_pb2.SkipOptions
Output = generation_pb2.OutputOptions
Constraint = generation_pb2.Constraint
TokenIds = common_pb2.TokenIds
Chat, Message = common_pb2.ChatPrompt, common_pb2.ChatMessage
NAN = float("nan")
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def skip(**options: Any) -> dict[str, Any]:
    return {"text": "a", "skip": Skip(**{"mode": "MODE_ADAPTIVE", **options})}


def sampling(**options: Any) -> dict[str, Any]:
    return {"text": "a", "sampling": Sampling(**options)}


def stopping(**options: Any) -> dict[str, Any]:
    return {"text": "a", "stopping": Stopping(**options)}


BAD_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "prompt"),
    "empty text": ({"text": ""}, "prompt"),
    "empty token ids": ({"token_ids": TokenIds()}, "prompt"),
    "prompt longer than the context": ({"text": "a" * 600}, "prompt"),
    "huge prompt": ({"token_ids": TokenIds(ids=[1] * 200_000)}, "prompt"),
    "token id outside the vocabulary": ({"token_ids": TokenIds(ids=[1, 260])}, "token_ids[1]"),
    "chat without messages": ({"chat": Chat()}, "chat.messages"),
    "chat with an empty role": ({"chat": Chat(messages=[Message(content="a")])}, "chat.messages[0].role"),
    "role unknown to the template": ({"chat": Chat(messages=[Message(role="wizard", content="a")])}, "chat"),
    "temperature NaN": (sampling(temperature=NAN), "sampling.temperature"),
    "temperature negative": (sampling(temperature=-0.5), "sampling.temperature"),
    "temperature infinite": (sampling(temperature=float("inf")), "sampling.temperature"),
    "top_k negative": (sampling(top_k=-1), "sampling.top_k"),
    "top_p zero": (sampling(top_p=0), "sampling.top_p"),
    "min_p above 1": (sampling(min_p=1.5), "sampling.min_p"),
    "repetition_penalty zero": (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    "presence_penalty too large": (sampling(presence_penalty=101), "sampling.presence_penalty"),
    "logit_bias NaN": (sampling(logit_bias={7: NAN}), "sampling.logit_bias[7]"),
    "logit_bias outside the vocabulary": (sampling(logit_bias={9999: 1}), "sampling.logit_bias"),
    "max_new_tokens zero": (stopping(max_new_tokens=0), "stopping.max_new_tokens"),
    "max_new_tokens negative": (stopping(max_new_tokens=-1), "stopping.max_new_tokens"),
    "max_new_tokens over the limit": (stopping(max_new_tokens=501), "stopping.max_new_tokens"),
    "max_new_tokens over the context": (
        {"text": "a" * 400, "stopping": Stopping(max_new_tokens=300)},
        "stopping.max_new_tokens",
    ),
    "10,000 stop strings": (stopping(stop_strings=["a"] * 10_000), "stopping.stop_strings"),
    "empty stop string": (stopping(stop_strings=["a", ""]), "stopping.stop_strings[1]"),
    "overlong stop string": (stopping(stop_strings=["ä" * 129]), "stopping.stop_strings[0]"),
    "stop token id outside the vocabulary": (stopping(stop_token_ids=[260]), "stopping.stop_token_ids"),
    "constraint of no kind": ({"text": "a", "constraint": Constraint()}, "constraint"),
    "schema that is no JSON": ({"text": "a", "constraint": Constraint(json_schema="{")}, "constraint.json_schema"),
    "schema that is a list": ({"text": "a", "constraint": Constraint(json_schema="[]")}, "constraint.json_schema"),
    "schema that is too long": (
        {"text": "a", "constraint": Constraint(json_schema='{"a": "' + "b" * 70_000 + '"}')},
        "constraint.json_schema",
    ),
    "schema of no type": (
        {"text": "a", "constraint": Constraint(json_schema='{"type": "strng"}')},
        "constraint.json_schema",
    ),
    "pattern that is none": ({"text": "a", "constraint": Constraint(regex="([")}, "constraint.regex"),
    "grammar that is none": (
        {"text": "a", "constraint": Constraint(lark_grammar="start: x")},
        "constraint.lark_grammar",
    ),
    "empty pattern": ({"text": "a", "constraint": Constraint(regex="")}, "constraint.regex"),
    "no choices": ({"text": "a", "constraint": Constraint(choices={})}, "constraint.choices"),
    "empty choice": ({"text": "a", "constraint": Constraint(choices={"texts": ["a", ""]})}, "constraint.choices"),
    **{f"tools: {case}": ({"chat": prompt}, field) for case, (prompt, field) in BAD_TOOLS.items()},
    "constraint beside tools": (
        {"chat": Chat(messages=[USER], tools=[CLOCK]), "constraint": Constraint(regex="a")},
        "constraint",
    ),
    "unknown priority": ({"text": "a", "priority": 9}, "priority"),
    "no answers": ({"text": "a", "n": 0}, "n"),
    "too many answers": ({"text": "a", "n": 17}, "n"),
    "unknown mode": (skip(mode=17), "skip.mode"),
    "negative mode": (skip(mode=-1), "skip.mode"),
    "budget zero": (skip(compute_budget=0), "skip.compute_budget"),
    "budget above 1": (skip(compute_budget=1.01), "skip.compute_budget"),
    "budget NaN": (skip(compute_budget=NAN), "skip.compute_budget"),
    "budget below the policy's lowest": (skip(compute_budget=0.3), "skip.compute_budget"),
    "budget in another mode": (skip(mode="MODE_FULL_DEPTH", compute_budget=0.9), "skip.compute_budget"),
    "unknown policy": (skip(policy_name="nobody"), "skip.policy_name"),
    "draft_length in another mode": (skip(draft_length=4), "skip.draft_length"),
    "no fixed action": (skip(mode="MODE_FIXED"), "skip.fixed_action"),
    "unspecified fixed action": (
        skip(mode="MODE_FIXED", fixed_action="ACTION_UNSPECIFIED"),
        "skip.fixed_action",
    ),
    "unknown fixed action": (skip(mode="MODE_FIXED", fixed_action=9), "skip.fixed_action"),
    "fixed action without a kernel": (skip(mode="MODE_FIXED", fixed_action="ACTION_INT4"), "skip.fixed_action"),
    "fixed action in another mode": (skip(fixed_action="ACTION_SKIP"), "skip.fixed_action"),
    "logprobs negative": ({"text": "a", "output": Output(logprobs=-1)}, "output.logprobs"),
    "logprobs above 20": ({"text": "a", "output": Output(logprobs=21)}, "output.logprobs"),
}


def in_field_1(*parts: bytes) -> bytes:
    """Returns the bytes of a request whose `parameters` are the concatenated parts."""
    content = b"".join(parts)
    assert len(content) < 128
    return b"\x0a" + bytes([len(content)]) + content


TEXT = Parameters(text="abc").SerializeToString()
IDS = Parameters(token_ids=TokenIds(ids=[1])).SerializeToString()
CHAT = Parameters(chat=Chat(messages=[Message(role="user"), Message(role="user", content="abc")])).SerializeToString()
STOP = Parameters(stopping=Stopping(stop_strings=["ok", "abc"])).SerializeToString()

BAD_BYTES = {
    "garbage": (b"\xff\xfe\xfd", "request"),
    "truncated": (in_field_1(TEXT)[:-1], "request"),
    "garbage inside": (in_field_1(b"\xff"), "request"),
    "two prompts": (in_field_1(TEXT, IDS), "parameters.prompt"),
    "two prompts in two halves": (in_field_1(TEXT) + in_field_1(IDS), "parameters.prompt"),
    "text that is not UTF-8": (in_field_1(TEXT.replace(b"abc", b"a\xffc")), "parameters.text"),
    "content that is not UTF-8": (
        in_field_1(CHAT.replace(b"abc", b"a\xffc")),
        "parameters.chat.messages[1].content",
    ),
    "stop string that is not UTF-8": (
        in_field_1(STOP.replace(b"abc", b"\xed\xa0\x80")),
        "parameters.stopping.stop_strings[1]",
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model_folder: Path) -> AsyncIterator[RunningServer]:
    async with running_server(fake_model(model_folder), context_length=600, max_new_tokens=500) as running:
        yield running


async def assert_still_well(server: RunningServer) -> None:
    assert (await server.generate(text="ok", max_new_tokens=2)).output.text == "ok"
    assert (await server.probe()).num_live == 0


@pytest.mark.parametrize("case", BAD_PARAMETERS)
async def test_bad_parameter_is_named_by_all_methods(server: RunningServer, case: str) -> None:
    parameters, field = BAD_PARAMETERS[case]
    async with open_session(server) as session:
        await session.begin(1, **parameters)
        assert await session.end_of(1) is INVALID
        violations = session.details(1)["BadRequest"].field_violations
        assert [violation.field for violation in violations] == [f"parameters.{field}"]
    for call in (server.generate(**parameters), server.stream(**parameters)):
        refused = await refusal(call)
        assert (refused.code, refused.fields) == (INVALID, [f"parameters.{field}"])
        assert refused.message.startswith(f"parameters.{field}: ")
    await assert_still_well(server)


@pytest.mark.parametrize("case", BAD_BYTES)
async def test_bad_bytes_are_an_invalid_argument(server: RunningServer, case: str) -> None:
    data, field = BAD_BYTES[case]
    for method in ("Generate", "StreamGenerate"):
        refused = await refusal(server.channel.unary_stream(f"/dash_api.v1.GenerationService/{method}")(data))
        assert (refused.code, refused.fields) == (INVALID, [field])
    await assert_still_well(server)


async def test_tokenize_names_its_own_fields(server: RunningServer) -> None:
    text, chat = model_pb2.TokenizeRequest(text="a"), model_pb2.TokenizeRequest(chat=Chat(messages=[USER]))
    for data, field in (
        (b"", "prompt"),
        (model_pb2.TokenizeRequest(chat=Chat()).SerializeToString(), "chat.messages"),
        (text.SerializeToString() + chat.SerializeToString(), "prompt"),  # two members of a oneof
    ):
        refused = await refusal(server.channel.unary_unary("/dash_api.v1.ModelService/Tokenize")(data))
        assert (refused.code, refused.fields) == (INVALID, [field])


Score = generation_pb2.ScoreRequest
GIVEN = Parameters(text="ab")


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (Score(text="c"), ["parameters.prompt"]),
        (Score(parameters=GIVEN, text=""), ["continuation"]),
        (Score(parameters=GIVEN, token_ids=TokenIds()), ["continuation"]),
        (Score(parameters=GIVEN, token_ids=TokenIds(ids=[1, 999])), ["continuation[1]"]),
        (Score(parameters=Parameters(text="a")), ["continuation"]),
        (Score(parameters=Parameters(text=""), text="c"), ["parameters.prompt"]),
        (Score(parameters=Parameters(chat=Chat()), text="c"), ["parameters.chat.messages"]),
        (Score(parameters=GIVEN, text="c" * 600), ["continuation"]),
        (Score(parameters=Parameters(text="a" * 400), text="c" * 300), ["continuation"]),
        (Score(parameters=Parameters(text="ab", output=Output(logprobs=21)), text="c"), ["parameters.output.logprobs"]),
        (
            Score(
                parameters=Parameters(
                    text="ab", sampling=Sampling(top_k=1), stopping=Stopping(max_new_tokens=1), skip=Skip(mode=17)
                ),
                text="c",
            ),
            ["parameters.sampling", "parameters.stopping", "parameters.skip.mode"],
        ),
    ],
)
async def test_score_names_its_own_fields(
    server: RunningServer, request_: generation_pb2.ScoreRequest, fields: list[str]
) -> None:
    refused = await refusal(server.generation.Score(request_))
    assert (refused.code, refused.fields) == (INVALID, fields)
    await assert_still_well(server)


async def test_unknown_policy_of_get_policy(server: RunningServer) -> None:
    refused = await refusal(server.model.GetPolicy(model_pb2.GetPolicyRequest(name="nobody")))
    assert (refused.code, refused.fields) == (INVALID, ["name"])


async def test_several_mistakes_are_told_at_once(server: RunningServer) -> None:
    stopping = Stopping(max_new_tokens=0, stop_strings=[""])
    refused = await refusal(server.generate(sampling=Sampling(top_p=2), stopping=stopping, skip=Skip(mode=17)))
    assert refused.fields == [
        "parameters.sampling.top_p",
        "parameters.stopping.max_new_tokens",
        "parameters.stopping.stop_strings[0]",
        "parameters.skip.mode",
        "parameters.prompt",
    ]


async def test_error_carries_reason_domain_and_request_id(server: RunningServer) -> None:
    refused = await refusal(server.generate())
    status = status_pb2.Status.FromString(refused.trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (INVALID.value[0], refused.message)
    assert (refused.reason, refused.details["ErrorInfo"].domain) == ("INVALID_REQUEST", "dash-llm")
    assert len(refused.details["ErrorInfo"].metadata["request_id"]) == 32


async def test_a_huge_wrong_value_is_not_sent_back_whole(server: RunningServer) -> None:
    refused = await refusal(server.generate(**skip(policy_name="ä" * 500_000)))
    assert refused.fields == ["parameters.skip.policy_name"]
    assert len(refused.message) < 400


async def test_a_message_over_the_limit_is_refused(server: RunningServer) -> None:
    assert (await refusal(server.generate(text="a" * 5_000_000))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await assert_still_well(server)


async def test_more_messages_than_anybody_needs_are_refused_before_they_are_made(server: RunningServer) -> None:
    chat = common_pb2.ChatPrompt(messages=[common_pb2.ChatMessage()] * 100_000)
    refused = await refusal(server.generate(chat=chat))
    assert refused.fields == ["request"]
    chat = common_pb2.ChatPrompt(messages=[common_pb2.ChatMessage()] * 5000)
    refused = await refusal(server.generate(chat=chat))
    assert refused.fields == ["parameters.chat.messages"]


async def test_refusal_by_the_worker_names_the_field(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, refuse="sampling.top_k")) as server:
        refused = await refusal(server.generate(text="a"))
        assert (refused.code, refused.fields) == (INVALID, ["parameters.sampling.top_k"])


async def test_chat_without_a_template_is_an_invalid_argument(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    async with running_server(fake_model(tmp_path)) as server:
        refused = await refusal(server.generate(chat=Chat(messages=[USER])))
        assert (refused.code, refused.fields) == (INVALID, ["parameters.chat"])
        assert (await server.generate(text="ok", max_new_tokens=2)).output.text == "ok"


@pytest.mark.parametrize(
    ("settings", "options", "of_toy", "of_learned", "lowest_of_learned"),
    [
        ({}, {}, 0.95, 0.55, "0.500"),
        ({"default_compute_budget": 0.6}, {}, 0.9, 0.6, "0.500"),
        ({}, {"replaces_costs": 1}, 0.95, 0.75, "0.700"),
    ],
    ids=["recommended", "default, raised to the lowest", "of costs replaced while serving"],
)
async def test_a_request_without_a_budget_gets_one_that_its_policy_can_keep(
    model_folder: Path,
    settings: dict[str, float],
    options: dict[str, int],
    of_toy: float,
    of_learned: float,
    lowest_of_learned: str,
) -> None:
    learned = Skip(mode="MODE_ADAPTIVE", policy_name="learned")
    async with running_server(fake_model(model_folder, **options), **settings) as server:
        for policy, expected in ((None, of_toy), (learned, of_learned)):
            started = (await server.generate(text="a", max_new_tokens=1, skip=policy)).started
            assert started.compute_budget == pytest.approx(expected)
        learned.compute_budget = float(lowest_of_learned) - 0.1
        refused = await refusal(server.generate(text="a", skip=learned))
        assert refused.fields == ["parameters.skip.compute_budget"]
        assert f"below {lowest_of_learned}" in refused.message
