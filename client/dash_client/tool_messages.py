"""Turns tools and their calls into messages and back. Knows no calls to a server and no answers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dash_api.v1 import common_pb2
from dash_client import checks
from dash_client.constraint import is_model_class
from dash_client.errors import invalid_argument
from dash_client.json_schema import closed
from dash_client.tools import AnyTool, Tool, ToolCall

_CHOICES = {
    "auto": common_pb2.TOOL_CHOICE_AUTO,
    "none": common_pb2.TOOL_CHOICE_NONE,
    "required": common_pb2.TOOL_CHOICE_REQUIRED,
}


def add_tools(chat: common_pb2.ChatPrompt, tools: Sequence[AnyTool], choice: str | None = None) -> None:
    """Adds the option `tools`, and the option `tool_choice`, to a conversation.

    Raises:
        InvalidArgumentError: a tool is none of the kinds, or cannot be sent; or the choice is none.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise invalid_argument("tools", f"must be a list of tools, not {type(tools).__name__}")
    for place, given in enumerate(tools):
        argument = f"tools[{place}]"
        tool = _tool(given, argument)
        if not isinstance(tool.parameters, Mapping):
            raise invalid_argument(f"{argument}.parameters", "must be a JSON schema as a dict")
        chat.tools.add(
            name=checks.text(f"{argument}.name", tool.name),
            description=checks.text(f"{argument}.description", tool.description),
            parameters_json_schema=_schema(tool.parameters, f"{argument}.parameters"),
        )
    if choice is None:
        return
    if choice in list(_CHOICES):
        chat.tool_choice = _CHOICES[choice]
    elif choice in [tool.name for tool in chat.tools]:
        chat.tool_choice, chat.required_tool = common_pb2.TOOL_CHOICE_REQUIRED, choice
    else:
        raise invalid_argument("tool_choice", f"must be {', '.join(_CHOICES)} or a tool's name, not {choice!r}")


def call_message(call: Any, argument: str) -> common_pb2.ToolCall:
    """Returns the message of a call in a conversation: a `ToolCall`, or a dict in OpenAI's form.

    Raises:
        InvalidArgumentError: it is neither, or cannot be sent.
    """
    if isinstance(call, ToolCall):
        fields: tuple[Any, Any, Any] = call.id, call.name, call.arguments
    elif isinstance(call, Mapping) and isinstance(function := call.get("function"), Mapping):
        fields = call.get("id", ""), function.get("name"), function.get("arguments")
    else:
        raise invalid_argument(argument, "must be a ToolCall or a dict in OpenAI's form")
    call_id, name, arguments = fields
    if not isinstance(arguments, str):  # OpenAI's are JSON already
        arguments = _json(arguments, f"{argument}.arguments")
    return common_pb2.ToolCall(
        id=checks.text(f"{argument}.id", call_id),
        name=checks.text(f"{argument}.name", name),
        arguments_json=checks.text(f"{argument}.arguments", arguments),
    )


def tool_call(message: common_pb2.ToolCall) -> ToolCall:
    """Returns the call that a message holds. Raises ValueError: its arguments are no JSON object."""
    arguments = json.loads(message.arguments_json)
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are no object")
    return ToolCall(message.id, message.name, arguments)


def _tool(tool: Any, argument: str) -> Tool:
    if isinstance(tool, Tool):
        return tool
    if is_model_class(tool):
        schema = dict(cast(Any, tool).model_json_schema())
        return Tool(schema.pop("title", tool.__name__), schema.pop("description", ""), schema)
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and "name" in function:
            parameters = function.get("parameters") or {}
            return Tool(function["name"], function.get("description") or "", parameters)
    raise invalid_argument(argument, "must be a Tool, a pydantic model class or a dict in OpenAI's form")


def _schema(parameters: Mapping[str, Any], argument: str) -> str:
    return _json(closed(dict(parameters)), argument) if parameters else ""


def _json(value: Any, argument: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid_argument(argument, f"is not JSON: {error}") from None
