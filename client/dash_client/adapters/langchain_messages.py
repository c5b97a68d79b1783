"""Converts LangChain's messages to the server's, and calls and usage to LangChain's. Knows nothing of requests."""

import json
from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages import ToolCall as LangChainToolCall
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, tool_call, tool_call_chunk

from dash_client import types
from dash_client.errors import invalid_argument
from dash_client.tools import ToolCall

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
}


def conversation(messages: Sequence[BaseMessage]) -> list[types.ChatMessage]:
    """Returns the conversation for the model's chat template.

    Raises:
        InvalidArgumentError: a message is of another kind, holds more than text and calls, or holds an invalid call.
    """
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: BaseMessage, place: str) -> types.ChatMessage:
    converted = types.ChatMessage(role=_role(message, place), content=_text(message, place))
    if isinstance(message, AIMessage):
        if message.invalid_tool_calls:
            raise invalid_argument(place, "holds a call that is invalid")
        if message.tool_calls:
            calls = [ToolCall(call["id"] or "", call["name"], call["args"]) for call in message.tool_calls]
            converted["tool_calls"] = calls
    if isinstance(message, ToolMessage):
        converted["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            converted["name"] = message.name
    return converted


def _role(message: BaseMessage, place: str) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise invalid_argument(place, f"is a {message.type} message; the server takes system, human, AI and tool messages")


def _text(message: BaseMessage, place: str) -> str:
    if isinstance(message.content, str):
        return message.content
    parts = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
        elif block.get("type") == "text":
            parts.append(block["text"])
        elif block.get("type") == "json":
            parts.append(json.dumps(block.get("json")))
        elif block.get("type") not in ("tool_call", "tool_use"):  # those are in `tool_calls` too
            raise invalid_argument(place, f"holds a block of type {block.get('type')!r}; the server takes text only")
    return "".join(parts)


def calls(answered: Sequence[ToolCall]) -> list[LangChainToolCall]:
    """Returns the calls in LangChain's form."""
    return [tool_call(name=call.name, args=call.arguments, id=call.id) for call in answered]


def call_chunks(answered: Sequence[ToolCall], num_before: int) -> list[ToolCallChunk]:
    """Returns calls in LangChain's form for a stream that had so many calls before."""
    return [
        tool_call_chunk(name=call.name, args=json.dumps(call.arguments), id=call.id, index=place)
        for place, call in enumerate(answered, num_before)
    ]


def usage_metadata(usage: types.Usage) -> UsageMetadata:
    """Returns the token counts in LangChain's form."""
    counts = UsageMetadata(
        input_tokens=usage.prompt_token_count,
        output_tokens=usage.output_token_count,
        total_tokens=usage.prompt_token_count + usage.output_token_count,
    )
    if usage.cached_prompt_token_count:
        counts["input_token_details"] = InputTokenDetails(cache_read=usage.cached_prompt_token_count)
    return counts
