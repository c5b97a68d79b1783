"""The messages that go over the wire for a caller's arguments."""

import math
import re
from typing import Any

import pytest
from fake_dash_server import FakeDashServer

from dash_api.v1 import common_pb2, generation_pb2
from dash_client import Action, DashClient, InvalidArgumentError, Mode
from dash_client.requests import generation_parameters, score_request

DEFAULTS: list[tuple[str, str, Any]] = [
    ("sampling", "temperature", 0),
    ("sampling", "top_k", 0),
    ("sampling", "top_p", 1),
    ("sampling", "min_p", 0.0),
    ("sampling", "repetition_penalty", 1.0),
    ("sampling", "presence_penalty", 0.0),
    ("sampling", "frequency_penalty", 0.0),
    ("sampling", "seed", 0),
    ("stopping", "max_new_tokens", 1),
    ("stopping", "ignore_eos", False),
    ("skip", "compute_budget", 1),
    ("skip", "policy_name", ""),
    ("skip", "draft_length", 1),
    ("output", "logprobs", 0),
    ("output", "return_decisions", False),
    ("output", "trace", False),
]


@pytest.mark.parametrize(("group", "name", "value"), DEFAULTS)
def test_a_value_that_looks_like_none_is_sent(group: str, name: str, value: Any) -> None:
    parameters = generation_parameters("x", **{name: value})
    assert getattr(parameters, group).HasField(name)
    assert getattr(getattr(parameters, group), name) == value


def test_none_is_not_sent() -> None:
    nothing = dict.fromkeys((name for _, name, _ in DEFAULTS), None)
    lists = dict.fromkeys(("stop", "stop_token_ids", "logit_bias", "constraint", "mode", "fixed_action"), None)
    parameters = generation_parameters("x", **nothing, **lists)
    assert parameters == generation_pb2.GenerationParameters(text="x")


def test_every_option_arrives_at_the_server(server: FakeDashServer, client: DashClient) -> None:
    sampling: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "seed": 2**64 - 1, "logit_bias": {7: -1.5}}
    stopping: dict[str, Any] = {"stop_token_ids": [4], "max_new_tokens": 9}
    skip: dict[str, Any] = {"compute_budget": 0.7, "policy_name": "random"}
    output: dict[str, Any] = {"logprobs": 2, "return_decisions": True, "trace": True}
    others: dict[str, Any] = {"stop": ["a", "b"], "constraint": ["yes", "no"], "mode": Mode.ADAPTIVE, "priority": "low"}
    client.generate("x", n=2, **sampling, **stopping, **skip, **output, **others)
    client.stream("x", mode="fixed", fixed_action="int4", draft_length=4).final()
    unary, stream = (request.parameters for request in server.requests)
    assert unary == generation_pb2.GenerationParameters(
        text="x",
        n=2,
        priority=generation_pb2.PRIORITY_LOW,
        sampling=generation_pb2.SamplingParameters(**sampling),
        stopping=generation_pb2.StoppingParameters(**stopping, stop_strings=["a", "b"]),
        constraint=generation_pb2.Constraint(choices={"texts": ["yes", "no"]}),
        skip=generation_pb2.SkipOptions(**skip, mode=common_pb2.MODE_ADAPTIVE),
        output=generation_pb2.OutputOptions(**output),
    )
    assert stream.skip == generation_pb2.SkipOptions(
        mode=common_pb2.MODE_FIXED, fixed_action=common_pb2.ACTION_INT4, draft_length=4
    )


def test_one_stop_string_is_not_split_into_letters() -> None:
    assert list(generation_parameters("x", stop="end").stopping.stop_strings) == ["end"]


def test_a_prompt_is_text_ids_or_messages() -> None:
    assert generation_parameters("").WhichOneof("prompt") == "text"
    assert list(generation_parameters([0, 5]).token_ids.ids) == [0, 5]
    assert list(generation_parameters(range(3)).token_ids.ids) == [0, 1, 2]
    chat = generation_parameters([{"role": "user", "content": "hi"}]).chat
    assert chat == common_pb2.ChatPrompt(messages=[common_pb2.ChatMessage(role="user", content="hi")])


HI = {"role": "user", "content": "x"}
NO_PROMPTS: list[Any] = [[], b"bytes", None, 7, [1, "2"], [1.0], [-1], [2**32], ["a"], HI]
NO_MESSAGES: list[Any] = [[{"role": "user"}], [HI | {"content": None}], [HI, 3]]


@pytest.mark.parametrize("prompt", [*NO_PROMPTS, *NO_MESSAGES])
def test_a_prompt_of_another_kind_is_refused_by_name(prompt: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        generation_parameters(prompt)
    assert caught.value.field_violations[0].field.startswith("prompt")


WRONG_VALUES: dict[str, list[Any]] = {
    "temperature": ["hot", "0.5", True, -0.1, 100.5, math.nan, math.inf, [1]],
    "top_k": [-1, 2**40, 1.5],
    "top_p": [0, 1.1],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0, 101],
    "presence_penalty": [-101],
    "frequency_penalty": [101],
    "logit_bias": [{"a": 1.0}, {1: "a"}, {1: 101}, {-1: 1.0}, 3],
    "seed": [-1, 2**64],
    "max_new_tokens": [0, "8"],
    "stop": [3, "", ["a", ""], [b"\xff"], "\ud800"],
    "stop_token_ids": [[-1], [1.0], 5, "12"],
    "ignore_eos": [1, "no"],
    "constraint": ["yes", [], [1], ["\ud800"], 3, int, {"type": int}, {"default": math.nan}, re.compile(b"a")],
    "n": [0, "2"],
    "priority": ["urgent", 3],
    "tool_choice": ["required"],
    "tools": ["clock"],
    "mode": ["fast", 2],
    "compute_budget": [0, 1.01],
    "fixed_action": ["int2"],
    "policy_name": [1],
    "draft_length": [0],
    "logprobs": [21, -1, True],
    "return_decisions": [0],
    "trace": ["yes"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG_VALUES for value in WRONG_VALUES[name]])
def test_a_wrong_value_is_refused_by_name_before_anything_is_sent(name: str, value: Any) -> None:
    with DashClient("localhost:1", retries=0) as client:
        for call in (client.generate, client.stream, client.chat, client.chat_stream):
            with pytest.raises(InvalidArgumentError, match=name) as caught:
                call("x", **{name: value})
            assert caught.value.code == "INVALID_ARGUMENT"
            assert caught.value.field_violations[0].field.partition("[")[0] == name
        with pytest.raises(InvalidArgumentError, match=name):
            client.map(["x"], **{name: value})  # type: ignore[call-overload]


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    parameters = generation_parameters(
        numpy.array([3, 4]),
        temperature=numpy.float32(0.5),
        top_k=numpy.int64(5),
        logit_bias={numpy.int32(7): numpy.float64(-1.5)},
    )
    assert list(parameters.token_ids.ids) == [3, 4]
    assert parameters.sampling.temperature == 0.5
    assert parameters.sampling.top_k == 5
    assert dict(parameters.sampling.logit_bias) == {7: -1.5}


def test_a_long_wrong_value_is_not_quoted_whole() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        generation_parameters("x", temperature="hot" * 10_000)  # type: ignore[arg-type]
    assert len(caught.value.message) < 200


def test_chat_takes_messages_or_one_of_the_users(server: FakeDashServer, client: DashClient) -> None:
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert client.chat("Hi", temperature=0.5).text == "Hello"
    assert client.chat(history).text == "Hello"
    assert client.chat_stream(history, seed=1).final().text == "Hello"
    sent = [[(m.role, m.content) for m in request.parameters.chat.messages] for request in server.requests]
    whole = [("system", "Be brief."), ("user", "Hi")]
    assert sent == [[("user", "Hi")], whole, whole]
    assert server.requests[0].parameters.sampling.temperature == 0.5
    assert server.requests[2].parameters.sampling.seed == 1


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        (None, "messages"),
        (b"Hi", "messages"),
        ({"role": "user", "content": "Hi"}, "messages"),
        ([1, 2], "messages[0]"),
        (["Hi"], "messages[0]"),
        ([{"role": "user", "content": "Hi"}, "Hi"], "messages[1]"),
        ([{"role": "user", "text": "Hi"}], "messages[0]"),
        ([{"role": 1, "content": "Hi"}], "messages[0].role"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content"),
        ("\ud800", "messages[0].content"),
    ],
)
def test_wrong_messages_are_refused_by_name(messages: Any, field: str) -> None:
    with DashClient("localhost:1", retries=0) as client, pytest.raises(InvalidArgumentError) as caught:
        client.chat(messages)
    assert caught.value.field_violations[0].field == field


def test_arguments_of_the_other_calls_are_checked_too() -> None:
    with DashClient("localhost:1", retries=0) as client:
        with pytest.raises(InvalidArgumentError, match="name"):
            client.policy_info(3)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="request_id"):
            client.decisions(None)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="prompt"):
            client.tokenize("\ud800")
        for timeout in (0, -1, math.nan, "5", True, [1]):
            with pytest.raises(InvalidArgumentError, match="timeout"):
                client.health(timeout=timeout)  # type: ignore[arg-type]
            with pytest.raises(InvalidArgumentError, match="timeout"):
                client.wait_until_ready(timeout=timeout)  # type: ignore[arg-type]


def test_a_score_asks_for_text_token_ids_or_the_prompt_itself() -> None:
    request = score_request("a", " b", mode="fixed", fixed_action="int8", logprobs=2)
    assert (request.WhichOneof("continuation"), request.text) == ("text", " b")
    assert request.parameters.skip.fixed_action == common_pb2.ACTION_INT8
    assert request.parameters.output.logprobs == 2
    assert list(score_request([1], [2, 3]).token_ids.ids) == [2, 3]
    assert score_request([1], []).WhichOneof("continuation") == "token_ids"  # which the server refuses
    assert score_request("a b", None).WhichOneof("continuation") is None
    for wrong in (3, ["a"], [-1], {"a": 1}, b"a", "\ud800"):
        with pytest.raises(InvalidArgumentError, match="continuation"):
            score_request("a", wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temperature"):
        score_request("a", "b", temperature=1.0)  # type: ignore[call-arg]


def test_a_wrong_argument_is_a_value_error() -> None:
    assert issubclass(InvalidArgumentError, ValueError)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"no such option: temprature; there are .*temperature"):
        generation_parameters("x", temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("action", list(Action))
def test_an_action_is_given_as_enum_or_name(action: Action) -> None:
    assert generation_parameters("x", fixed_action=action).skip.fixed_action == action
    assert generation_parameters("x", fixed_action=action.name.lower()).skip.fixed_action == action


def test_the_enums_are_the_protocols() -> None:
    assert {f"ACTION_{action.name}": action.value for action in Action} | {"ACTION_UNSPECIFIED": 0} == dict(
        common_pb2.Action.items()
    )
    assert {f"MODE_{mode.name}" for mode in Mode} | {"MODE_UNSPECIFIED"} == set(common_pb2.Mode.keys())
