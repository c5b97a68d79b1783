"""Converts LangChain's messages to the server's, and usage to LangChain's. Knows nothing of calls."""

from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from dash_client import types
from dash_client.errors import invalid_argument

_ROLES: dict[type[BaseMessage], str] = {SystemMessage: "system", HumanMessage: "user", AIMessage: "assistant"}


def conversation(messages: Sequence[BaseMessage]) -> list[types.ChatMessage]:
    """Returns the conversation for the model's chat template.

    Raises:
        InvalidArgumentError: a message is not a system, human or AI message, or holds more than text.
    """
    return [
        types.ChatMessage(role=_role(message, f"messages[{place}]"), content=_text(message, f"messages[{place}]"))
        for place, message in enumerate(messages)
    ]


def _role(message: BaseMessage, place: str) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise invalid_argument(
        place, f"is a {message.type} message; the server takes system, human and AI messages, and calls no tools"
    )


def _text(message: BaseMessage, place: str) -> str:
    if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
        raise invalid_argument(place, "calls tools; the server takes text only")
    if isinstance(message.content, str):
        return message.content
    parts = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
        elif block.get("type") == "text":
            parts.append(block["text"])
        else:
            raise invalid_argument(place, f"holds a block of type {block.get('type')!r}; the server takes text only")
    return "".join(parts)


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
