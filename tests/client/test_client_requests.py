"""What goes over the wire for a caller's arguments."""

from typing import Any

import pytest
from fake_dash_server import FakeDashServer

from dash_api.v1 import common_pb2, generation_pb2
from dash_client import Action, DashClient, InvalidArgumentError, Mode
from dash_client.requests import generation_parameters

ZEROES: list[tuple[str, str, Any]] = [
    ("sampling", "temperature", 0),
    ("sampling", "top_k", 0),
    ("sampling", "top_p", 0.0),
    ("sampling", "min_p", 0.0),
    ("sampling", "repetition_penalty", 0.0),
    ("sampling", "presence_penalty", 0.0),
    ("sampling", "frequency_penalty", 0.0),
    ("sampling", "seed", 0),
    ("stopping", "max_new_tokens", 0),
    ("stopping", "ignore_eos", False),
    ("skip", "compute_budget", 0.0),
    ("skip", "policy_name", ""),
    ("skip", "draft_length", 0),
    ("output", "logprobs", 0),
    ("output", "return_decisions", False),
    ("output", "trace", False),
]


@pytest.mark.parametrize(("group", "name", "zero"), ZEROES)
def test_zero_is_sent(group: str, name: str, zero: Any) -> None:
    parameters = generation_parameters("x", **{name: zero})
    assert getattr(parameters, group).HasField(name)
    assert getattr(getattr(parameters, group), name) == zero


def test_none_is_not_sent() -> None:
    nothing = dict.fromkeys((name for _, name, _ in ZEROES), None)
    lists = dict.fromkeys(("stop", "stop_token_ids", "logit_bias", "mode", "fixed_action"), None)
    parameters = generation_parameters("x", **nothing, **lists)
    assert parameters == generation_pb2.GenerationParameters(text="x")


def test_every_option_arrives_at_the_server() -> None:
    with FakeDashServer() as server, DashClient(server.target) as client:
        client.generate(
            "x",
            temperature=0.5,
            top_k=3,
            seed=2**64 - 1,
            logit_bias={7: -1.5},
            stop=["a", "b"],
            stop_token_ids=[4],
            max_new_tokens=9,
            mode=Mode.ADAPTIVE,
            compute_budget=0.7,
            policy_name="random",
            logprobs=2,
            return_decisions=True,
            trace=True,
        )
        client.stream("x", mode="fixed", fixed_action="int4", draft_length=4).final()
    unary, stream = (request.parameters for request in server.requests)
    assert unary.sampling.temperature == 0.5
    assert unary.sampling.top_k == 3
    assert unary.sampling.seed == 2**64 - 1
    assert dict(unary.sampling.logit_bias) == {7: -1.5}
    assert list(unary.stopping.stop_strings) == ["a", "b"]
    assert list(unary.stopping.stop_token_ids) == [4]
    assert unary.stopping.max_new_tokens == 9
    assert unary.skip.mode == common_pb2.MODE_ADAPTIVE
    assert unary.skip.compute_budget == 0.7
    assert unary.skip.policy_name == "random"
    assert unary.output.logprobs == 2
    assert unary.output.return_decisions
    assert unary.output.trace
    assert stream.skip.mode == common_pb2.MODE_FIXED
    assert stream.skip.fixed_action == common_pb2.ACTION_INT4
    assert stream.skip.draft_length == 4


def test_one_stop_string_is_not_split_into_letters() -> None:
    assert list(generation_parameters("x", stop="end").stopping.stop_strings) == ["end"]


def test_a_prompt_is_text_ids_or_messages() -> None:
    assert generation_parameters("").WhichOneof("prompt") == "text"
    assert list(generation_parameters([0, 5]).token_ids.ids) == [0, 5]
    assert list(generation_parameters(range(3)).token_ids.ids) == [0, 1, 2]
    chat = generation_parameters([{"role": "user", "content": "hi"}]).chat
    assert chat == common_pb2.ChatPrompt(messages=[common_pb2.ChatMessage(role="user", content="hi")])


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        b"bytes",
        None,
        7,
        {"role": "user", "content": "x"},
        [1, "2"],
        [1.0],
        [-1],
        [2**32],
        ["a"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "x"}, 3],
    ],
)
def test_a_prompt_of_another_kind_is_refused_by_name(prompt: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        generation_parameters(prompt)
    assert caught.value.field_violations[0].field.startswith("prompt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("top_k", 2**40),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", 3),
        ("stop", [b"\xff"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: "a"}),
        ("logit_bias", 3),
        ("mode", "fast"),
        ("mode", 2),
        ("fixed_action", "int2"),
        ("policy_name", 1),
    ],
)
def test_a_value_that_cannot_be_sent_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=name) as caught:
        generation_parameters("x", **{name: value})  # type: ignore[misc]
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.field_violations[0].field == name


def test_a_wrong_argument_is_a_value_error() -> None:
    assert issubclass(InvalidArgumentError, ValueError)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
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
