"""Tools in chats: what the template gets, what calls may be, and how they come out of a text that comes in pieces."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from dash_api.v1 import common_pb2, model_pb2
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.errors import InvalidRequest
from dash_runtime.grammar import check_grammar, grammar_of
from dash_server.text import TextTokenizer
from dash_server.tools import ToolCallReader, read_tools, template_messages
from tests.server.server_harness import CHAT_TEMPLATE, RunningServer, fake_model, running_server
from tests.tiny_models import byte_tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = common_pb2.Tool(name="weather", description="Tells it", parameters_json_schema=json.dumps(CITY))
CLOCK = common_pb2.Tool(name="clock")
USER = common_pb2.ChatMessage(role="user", content="hi")


def chat(*tools: common_pb2.Tool, messages: Any = (USER,), **fields: Any) -> common_pb2.ChatPrompt:
    return common_pb2.ChatPrompt(messages=messages, tools=tools, **fields)


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


PARIS, NOW = call("weather", city="Paris", days=3), call("clock")


def read(pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    reader, text, calls = ToolCallReader("r-"), "", []
    for piece in pieces:
        outside, complete = reader.push(piece)
        text += outside
        calls += complete
    assert [one.id for one in calls] == [f"r-{number}" for number in range(1, len(calls) + 1)]
    return text + reader.finish(), [(one.name, json.loads(one.arguments_json)) for one in calls]


@given(st.data())
def test_calls_are_the_same_however_the_text_is_cut(data: st.DataObject) -> None:
    whole = f"Let me see.\n{PARIS}\n{NOW}"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1))))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(pieces) == ("Let me see.\n", [("weather", {"city": "Paris", "days": 3}), ("clock", {})])


@pytest.mark.parametrize("text", ["no call", "a < b <tool", "<tool_calls", PARIS[:-1], "so: " + PARIS[:30], ""])
def test_what_is_no_whole_call_is_text(text: str) -> None:
    assert read(list(text)) == (text, [])


def test_an_argument_may_hold_what_closes_a_call() -> None:
    tricky = call("weather", city="</tool_call> and <tool_call>")
    assert read([tricky]) == ("", [("weather", {"city": "</tool_call> and <tool_call>"})])


def tokenizer(has_marker_tokens: bool) -> TextTokenizer:
    base = byte_tokenizer("<|end|>")
    if has_marker_tokens:
        base.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return TextTokenizer(base)


def accepts(prompt: common_pb2.ChatPrompt, text: str, has_marker_tokens: bool) -> bool:
    """True if the text is a whole output that keeps the prompt's tools."""
    ours = tokenizer(has_marker_tokens)
    tools = read_tools(prompt, ChatTemplate(CHAT_TEMPLATE, {}), ours)
    assert tools is not None
    theirs = LLTokenizer(ours._tokenizer.to_str(), eos_token=[256])
    matcher = LLMatcher(theirs, grammar_of(tools.constraint(ours, check_grammar)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = ours.encode(text)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


@pytest.mark.parametrize("has_marker_tokens", [True, False])
@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        (
            {},
            ["Hello.", "", PARIS, f"Well.\n{PARIS}\n{NOW}", f"{PARIS} Done."],
            [call("weather", town="Paris"), call("weather"), call("rain"), f"x{PARIS[:-30]}"],
        ),
        ({"tool_choice": "TOOL_CHOICE_REQUIRED"}, [PARIS, f"{PARIS}\n{NOW}", NOW], ["", "Hello.", f"Well. {PARIS}"]),
        (
            {"tool_choice": "TOOL_CHOICE_REQUIRED", "required_tool": "clock"},
            [NOW],
            [PARIS, f"{NOW}\n{NOW}", call("clock", zone=1)],
        ),
        ({"parallel_tool_calls": False}, ["Hello.", "", PARIS, f"Well.\n{NOW}"], [f"{PARIS}\n{NOW}", f"{PARIS} Done."]),
        (
            {"tool_choice": "TOOL_CHOICE_REQUIRED", "parallel_tool_calls": False},
            [PARIS, NOW],
            ["", f"{PARIS}\n{NOW}", call("clock", zone=1)],
        ),
    ],
    ids=["auto", "required", "one", "auto, at most one", "one of all"],
)
def test_an_output_calls_tools_as_the_choice_and_the_schemas_say(
    has_marker_tokens: bool, options: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    prompt = chat(WEATHER, CLOCK, **options)
    assert [text for text in good if not accepts(prompt, text, has_marker_tokens)] == []
    assert [text for text in bad if accepts(prompt, text, has_marker_tokens)] == []


BAD_TOOLS: dict[str, tuple[common_pb2.ChatPrompt, str]] = {
    "no name": (chat(common_pb2.Tool()), "chat.tools[0].name"),
    "name with a blank": (chat(common_pb2.Tool(name="a b")), "chat.tools[0].name"),
    "same name twice": (chat(CLOCK, CLOCK), "chat.tools[1].name"),
    "schema that is no JSON": (
        chat(CLOCK, common_pb2.Tool(name="a", parameters_json_schema="{")),
        "chat.tools[1].parameters_json_schema",
    ),
    "schema of a number": (
        chat(common_pb2.Tool(name="a", parameters_json_schema='{"type": "number"}')),
        "chat.tools[0].parameters_json_schema",
    ),
    "schema that cannot be kept": (
        chat(common_pb2.Tool(name="a", parameters_json_schema='{"properties": {"b": {"type": "strng"}}}')),
        "chat.tools[0].parameters_json_schema",
    ),
    "schemas that are too long": (
        chat(common_pb2.Tool(name="a", parameters_json_schema='{"description": "' + "b" * 70_000 + '"}')),
        "chat.tools",
    ),
    "unknown choice": (chat(CLOCK, tool_choice=9), "chat.tool_choice"),
    "required without tools": (chat(tool_choice="TOOL_CHOICE_REQUIRED"), "chat.tool_choice"),
    "required tool that is none": (
        chat(CLOCK, tool_choice="TOOL_CHOICE_REQUIRED", required_tool="a"),
        "chat.required_tool",
    ),
    "required tool that need not be called": (chat(CLOCK, required_tool="clock"), "chat.required_tool"),
    "arguments that are no object": (
        chat(messages=[common_pb2.ChatMessage(role="assistant", tool_calls=[common_pb2.ToolCall(arguments_json="3")])]),
        "chat.messages[0].tool_calls[0].arguments_json",
    ),
}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages }}", "knows no tools"),
        ("{{ messages }}{{ tools }}[TOOL_CALLS]", "does not write calls between"),
    ],
)
def test_a_model_that_calls_no_tools_or_in_another_form_refuses_them(template: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as failure:
        read_tools(chat(CLOCK), ChatTemplate(template, {}), tokenizer(False))
    assert failure.value.field == "chat.tools"


def test_the_template_gets_calls_and_answers_as_objects() -> None:
    messages = [
        common_pb2.ChatMessage(
            role="assistant", tool_calls=[common_pb2.ToolCall(id="1", name="clock", arguments_json="{}")]
        ),
        common_pb2.ChatMessage(role="tool", content="noon", tool_call_id="1", name="clock"),
    ]
    called = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": {}}}
    assert template_messages(chat(messages=messages)) == [
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "noon", "tool_call_id": "1", "name": "clock"},
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model_folder: Path) -> AsyncIterator[RunningServer]:
    async with running_server(fake_model(model_folder), context_length=2000, max_new_tokens=1000) as running:
        yield running


@pytest.mark.asyncio(loop_scope="module")
async def test_calls_leave_the_text_and_come_with_the_message_of_their_last_token(server: RunningServer) -> None:
    # The fake worker puts out the prompt.
    prompt = chat(CLOCK, messages=[common_pb2.ChatMessage(role="user", content=f"Well.\n{NOW} So.")])
    ids = (await server.model.Tokenize(model_pb2.TokenizeRequest(chat=prompt))).token_ids
    answer = await server.generate(chat=prompt, max_new_tokens=len(ids))
    assert "Well.\n" in answer.output.text
    assert "So." in answer.output.text
    assert NOW not in answer.output.text
    assert list(answer.output.token_ids) == list(ids)[: len(answer.output.token_ids)]
    (called,) = answer.output.tool_calls
    assert (called.id, called.name, called.arguments_json) == (f"{answer.started.request_id}-1", "clock", "{}")
    deltas = [event.delta async for event in server.stream(chat=prompt, max_new_tokens=len(ids))]
    assert "".join(delta.text for delta in deltas) == answer.output.text
    assert [one.name for delta in deltas for one in delta.tool_calls] == ["clock"]


@pytest.mark.asyncio(loop_scope="module")
async def test_tools_that_may_not_be_called_are_neither_shown_nor_read(server: RunningServer) -> None:
    silent = chat(CLOCK, tool_choice="TOOL_CHOICE_NONE", messages=[common_pb2.ChatMessage(role="user", content=NOW)])
    plain = common_pb2.ChatPrompt(messages=silent.messages)
    requests = [model_pb2.TokenizeRequest(chat=prompt) for prompt in (silent, plain)]
    ids, same = [list((await server.model.Tokenize(request)).token_ids) for request in requests]
    assert ids == same
    answer = await server.generate(chat=silent, max_new_tokens=len(ids))
    assert NOW in answer.output.text
    assert not answer.output.tool_calls
