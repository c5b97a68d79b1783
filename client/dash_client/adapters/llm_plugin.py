"""The model `dash` of the `llm` command and library. Needs the extra `llm`, whose entry point loads this module.

    llm -m dash "What is the capital of France?" -o mode adaptive

Knows nothing of the command itself.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import llm
from llm.parts import ReasoningPart, TextPart, ToolCallPart, ToolResultPart
from pydantic import Field

from dash_client.adapters.answer_facts import answer_facts
from dash_client.adapters.option_fields import ConnectionFields, OptionFields, client_options
from dash_client.aio import AsyncDashClient
from dash_client.client import DashClient
from dash_client.errors import invalid_argument
from dash_client.tools import Tool, ToolCall
from dash_client.types import ChatMessage, Generation

MODEL_ID = "dash"


class DashOptions(ConnectionFields, OptionFields, llm.KeyModel.Options):
    """The options that `-o` sets."""

    tool_choice: str | None = Field(default=None, description="auto, none, required, or the name of a tool")


class _Dash:
    """The parts that both models share."""

    model_id = MODEL_ID
    needs_key: str | None = MODEL_ID
    key_env_var: str | None = "DASH_TOKEN"
    can_stream = True
    supports_schema = True
    supports_tools = True
    key: str | None
    Options = DashOptions

    def get_key(self, explicit_key: str | None = None) -> str | None:
        # Unlike `llm`'s own lookup, a missing key is no error: most servers require no token.
        return self.key or llm.get_key(input=explicit_key, alias=MODEL_ID, env="DASH_TOKEN")


class DashModel(_Dash, llm.KeyModel):
    """A dash server's model. The key is the server's token, if the server requires one."""

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
        key: str | None,
    ) -> Iterator[str]:
        messages, connection, options = _call(prompt, key)
        with DashClient(**connection) as client, client.chat_stream(messages, **options) as answer:
            for delta in answer:
                yield delta.text
            _note(response, answer.final())


class AsyncDashModel(_Dash, llm.AsyncKeyModel):
    """The asynchronous `DashModel`."""

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None,
        key: str | None,
    ) -> AsyncGenerator[str, None]:
        messages, connection, options = _call(prompt, key)
        async with AsyncDashClient(**connection) as client, client.chat_stream(messages, **options) as answer:
            async for delta in answer:
                yield delta.text
            _note(response, await answer.final())


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Registers the models; called by `llm`."""
    register(DashModel(), AsyncDashModel())


def _call(prompt: llm.Prompt, key: str | None) -> tuple[list[ChatMessage], dict[str, Any], dict[str, Any]]:
    """Returns the conversation, the client's arguments, and the options of the call."""
    options = client_options(dict(prompt.options))
    connection = {name: options.pop(name) for name in ConnectionFields.model_fields if name in options}
    if key is not None:
        connection["token"] = key
    if prompt.schema is not None:
        # `llm` has turned a model class into its schema.
        options["constraint"] = prompt.schema
    if prompt.tools:
        options["tools"] = [_tool(tool) for tool in prompt.tools]
    return _messages(prompt), connection, options


def _tool(tool: Any) -> Tool:
    if not isinstance(tool, llm.Tool):
        raise invalid_argument("tools", f"holds a {type(tool).__name__}; the server takes functions only")
    return Tool(tool.name, tool.description or "", tool.input_schema or {})


def _messages(prompt: llm.Prompt) -> list[ChatMessage]:
    messages = [converted for message in prompt.messages for converted in _converted(message)]
    if prompt.system:
        # In a later turn, `llm` sets a new system prompt here and keeps the old one in the conversation.
        messages = [message for message in messages if message["role"] != "system"]
        messages.insert(0, ChatMessage(role="system", content=prompt.system))
    return messages


def _converted(message: llm.Message) -> list[ChatMessage]:
    """Returns the server's messages for one of `llm`'s, which may hold the answers of several tools."""
    text, tool_calls, answers = "", [], []
    for part in message.parts:
        match part:
            case TextPart():
                text += part.text
            case ToolCallPart():
                tool_calls.append(ToolCall(part.tool_call_id or "", part.name, part.arguments))
            case ToolResultPart():
                answer = ChatMessage(role="tool", content=part.output, name=part.name)
                answers.append(answer | {"tool_call_id": part.tool_call_id or ""})
            case ReasoningPart():
                pass  # another model's reasoning is not part of its answer
            case _:
                raise invalid_argument("messages", f"holds a {type(part).__name__}; the server takes text only")
    if answers:
        return answers
    converted = ChatMessage(role=message.role, content=text)
    if tool_calls:
        converted["tool_calls"] = tool_calls
    return [converted]


def _note(response: llm.Response | llm.AsyncResponse, generation: Generation) -> None:
    """Stores calls, usage and facts in the response, for the logs and `--usage` of `llm`."""
    for call in generation.tool_calls:
        response.add_tool_call(llm.ToolCall(name=call.name, arguments=call.arguments, tool_call_id=call.id))
    usage = generation.usage
    cached = usage.cached_prompt_token_count
    response.set_usage(
        input=usage.prompt_token_count,
        output=usage.output_token_count,
        details={"cached_tokens": cached} if cached else None,
    )
    response.set_resolved_model(generation.started.model)
    response.response_json = answer_facts(generation)
