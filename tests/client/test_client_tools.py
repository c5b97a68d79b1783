"""Tools, calls and their answers, as a caller says them and as they go over the wire."""

import json
import math
from typing import Any

import pytest
from fake_dash_server import FakeDashServer, delta, finished, started
from pydantic import BaseModel

from dash_api.v1 import common_pb2
from dash_client import AnyTool, DashClient, InvalidArgumentError, Prompt, Tool, ToolCall
from dash_client.json_schema import closed
from dash_client.requests import chat_parameters, generation_parameters

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


class Weather(BaseModel):
    """Tells it."""

    city: str
    days: int = 1


@pytest.mark.parametrize(
    "tool",
    [
        Tool("Weather", "Tells it.", WEATHER),
        {"type": "function", "function": {"name": "Weather", "description": "Tells it.", "parameters": WEATHER}},
        {"name": "Weather", "description": "Tells it.", "parameters": WEATHER},
        Weather,
    ],
)
def test_a_tool_is_said_in_pythons_own_ways_and_takes_no_arguments_but_its_own(tool: AnyTool) -> None:
    (sent,) = chat_parameters("hi", tools=[tool]).chat.tools
    assert (sent.name, sent.description) == ("Weather", "Tells it.")
    schema = json.loads(sent.parameters_json_schema)
    assert (schema["properties"].keys(), schema["additionalProperties"]) == ({"city", "days"}, False)
    assert chat_parameters("hi", tools=[Tool("clock")]).chat.tools[0].parameters_json_schema == ""


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        (
            {"properties": {"properties": {"items": {"properties": {}}}}},
            {
                "properties": {"properties": {"items": {"properties": {}, "additionalProperties": False}}},
                "additionalProperties": False,
            },
        ),
        (
            {"properties": {}, "allOf": [{"properties": {"a": {}}}]},
            {"properties": {}, "allOf": [{"properties": {"a": {}}}]},
        ),
        (
            {"anyOf": [{"properties": {"a": True}}], "enum": [{"properties": {}}]},
            {"anyOf": [{"properties": {"a": True}, "additionalProperties": False}], "enum": [{"properties": {}}]},
        ),
    ],
)
def test_only_what_describes_a_whole_object_is_closed(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert closed(schema) == expected


@pytest.mark.parametrize(
    ("choice", "number", "required"),
    [
        (None, 0, ""),
        ("auto", common_pb2.TOOL_CHOICE_AUTO, ""),
        ("none", common_pb2.TOOL_CHOICE_NONE, ""),
        ("required", common_pb2.TOOL_CHOICE_REQUIRED, ""),
        ("clock", common_pb2.TOOL_CHOICE_REQUIRED, "clock"),
    ],
)
def test_a_choice_is_a_word_or_a_tools_name(choice: str | None, number: int, required: str) -> None:
    chat = chat_parameters("hi", tools=[Weather, Tool("clock")], tool_choice=choice).chat
    assert (chat.tool_choice, chat.required_tool) == (number, required)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tools": [3]}, "tools[0]"),
        ({"tools": [Tool("clock"), {"type": "function"}]}, "tools[1]"),
        ({"tools": [Tool("clock", parameters={"default": math.nan})]}, "tools[0].parameters"),
        ({"tools": [Tool("clock", parameters=3)]}, "tools[0].parameters"),  # type: ignore[arg-type]
        ({"tools": [Tool(3)]}, "tools[0].name"),  # type: ignore[arg-type]
        ({"tools": [Tool("clock")], "tool_choice": "watch"}, "tool_choice"),
        ({"tools": [Tool("clock")], "tool_choice": ["clock"]}, "tool_choice"),
    ],
)
def test_a_wrong_tool_is_refused_by_its_place(options: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        chat_parameters("hi", **options)
    assert refusal.value.field_violations[0].field == field


@pytest.mark.parametrize("prompt", ["text", [1, 2]])
def test_a_prompt_that_is_no_conversation_has_no_tools(prompt: Prompt) -> None:
    with pytest.raises(InvalidArgumentError, match="tools: need a list of messages"):
        generation_parameters(prompt, tools=[Tool("clock")])


def test_an_answers_calls_go_back_with_what_the_tools_returned() -> None:
    called = common_pb2.ToolCall(id="1", name="clock", arguments_json='{"zone": "CET"}')
    with FakeDashServer() as server, DashClient(server.target) as client:
        server.script = [started(), delta("Well.", [1], tool_calls=[called]), finished(1)]
        answer = client.chat("When?", tools=[Tool("clock")])
        with client.chat_stream("When?", tools=[Tool("clock")]) as stream:
            calls = [call for piece in stream for call in piece.tool_calls]
            assert stream.final().tool_calls == tuple(calls) == answer.tool_calls
        assert (answer.text, answer.tool_calls) == ("Well.", (ToolCall("1", "clock", {"zone": "CET"}),))
        result = {"role": "tool", "tool_call_id": "1", "name": "clock", "content": "noon"}
        client.chat([{"role": "user", "content": "When?"}, answer.message, result])
        client.tokenize([{"role": "user", "content": "When?"}], tools=[Tool("clock")])
    assert [tool.name for tool in server.requests[-1].chat.tools] == ["clock"]
    _, told, back = server.requests[-2].parameters.chat.messages
    assert (told.role, told.content, list(told.tool_calls)) == ("assistant", "Well.", [called])
    assert (back.role, back.content, back.tool_call_id, back.name) == ("tool", "noon", "1", "clock")


def test_calls_in_a_conversation_may_be_in_openais_form() -> None:
    function = {"name": "clock", "arguments": '{"zone": "CET"}'}
    calls = [{"id": "1", "type": "function", "function": function}]
    (sent,) = chat_parameters([{"role": "assistant", "content": None, "tool_calls": calls}]).chat.messages
    assert sent.content == ""
    assert list(sent.tool_calls) == [common_pb2.ToolCall(id="1", name="clock", arguments_json='{"zone": "CET"}')]
    with pytest.raises(InvalidArgumentError) as refusal:
        chat_parameters([{"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}])
    assert refusal.value.field_violations[0].field == "messages[0].tool_calls[0]"
