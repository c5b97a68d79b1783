"""Builds protobuf requests from a caller's arguments. Shared by both clients.

Knows the field of each option; `checks` knows its type and range. Sends nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar, Unpack

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_client import checks
from dash_client.constraint_messages import constraint_message
from dash_client.errors import invalid_argument
from dash_client.options import GenerationOptions, Messages, Prompt
from dash_client.score import ScoreOptions
from dash_client.tool_messages import add_tools, call_message
from dash_client.tools import AnyTool
from dash_client.types import Action, Mode, Priority

E = TypeVar("E", bound=Enum)

_MODES = {mode: getattr(common_pb2, f"MODE_{mode.name}") for mode in Mode}
_MESSAGE = generation_pb2.GenerationParameters.DESCRIPTOR.fields_by_name
_GROUPS = {
    field: group
    for group in ("sampling", "stopping", "skip", "output")
    for field in _MESSAGE[group].message_type.fields_by_name
}
"""The message that holds each option's field; those of no group are fields of the whole."""
_NEEDED, _OF_TOOLS = {"role", "content"}, {"tool_calls", "tool_call_id", "name"}
"""The keys of a message."""


def generation_parameters(prompt: Prompt, **options: Unpack[GenerationOptions]) -> generation_pb2.GenerationParameters:
    """Returns the message for a prompt and options.

    Raises:
        InvalidArgumentError: a value is of the wrong type or out of range; its `field_violations` name the argument.
        TypeError: there is no such option.
    """
    return with_prompt(option_parameters(**options), prompt)


def option_parameters(**options: Unpack[GenerationOptions]) -> generation_pb2.GenerationParameters:
    """Returns the message for options alone. Raises the same as `generation_parameters`."""
    checks.require_known(options, GenerationOptions)
    fields: dict[str, Any] = {}
    tools, tool_choice = options.pop("tools", None), options.pop("tool_choice", None)
    are_parallel = options.pop("parallel_tool_calls", None)
    for name, value in options.items():
        if value is not None:
            field = "stop_strings" if name == "stop" else name
            group = fields.setdefault(_GROUPS[field], {}) if field in _GROUPS else fields
            group[field] = _checked(name, value)
    parameters = generation_pb2.GenerationParameters(**fields)
    if tools:
        add_tools(parameters.chat, tools, tool_choice)
        if are_parallel is not None:
            parameters.chat.parallel_tool_calls = checks.flag("parallel_tool_calls", are_parallel)
    elif tool_choice not in (None, "auto", "none"):
        raise invalid_argument("tool_choice", "needs tools to call")
    return parameters


def _checked(name: str, value: Any) -> Any:
    """Returns the value of an option in the form that its field takes."""
    match name:
        case "constraint":
            return constraint_message(value)
        case "priority":
            return f"PRIORITY_{_member(Priority, name, value).name}"
        case "mode":
            return _MODES[_member(Mode, name, value)]
        case "fixed_action":
            return int(_member(Action, name, value))
        case "stop":
            return _stop_strings(value)
        case "stop_token_ids":
            return [checks.token_id(name, item) for item in _listed(name, value, "a list of token ids")]
        case "logit_bias":
            if not isinstance(value, Mapping):
                raise invalid_argument(name, "must map token ids to numbers")
            biases = ((checks.token_id(name, key), bias) for key, bias in value.items())
            return {token_id: checks.number(name, bias, f"{name}[{token_id}]") for token_id, bias in biases}
    return checks.option(name, value)


def _stop_strings(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else _listed("stop", value, "a list of strings")
    if not all(checks.text("stop", item) for item in values):
        raise invalid_argument("stop", "must not hold an empty string")
    return values


def with_prompt(parameters: generation_pb2.GenerationParameters, prompt: Prompt) -> generation_pb2.GenerationParameters:
    """Sets the message's prompt, and returns the message.

    Raises:
        InvalidArgumentError: it is not a prompt.
    """
    is_text = isinstance(prompt, str)
    items = [] if is_text else _listed("prompt", prompt, "text, token ids or a list of messages")
    is_ids = bool(items) and not isinstance(items[0], Mapping)
    if parameters.HasField("chat") and (is_text or is_ids):
        raise invalid_argument("tools", "need a list of messages as the prompt")
    if is_text:
        parameters.text = checks.text("prompt", prompt)
    elif is_ids:
        parameters.token_ids.ids.extend([checks.token_id("prompt", item) for item in items])
    else:
        _add_messages(parameters.chat, items, "prompt")
    return parameters


def chat_parameters(messages: Messages, **options: Unpack[GenerationOptions]) -> generation_pb2.GenerationParameters:
    """Returns the message for a conversation and options. Raises the same as `generation_parameters`."""
    parameters = option_parameters(**options)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    items = _listed("messages", messages, 'text or a list of {"role": …, "content": …}')
    _add_messages(parameters.chat, items, "messages")
    return parameters


def score_request(
    prompt: Prompt, continuation: str | Sequence[int] | None, **options: Unpack[ScoreOptions]
) -> generation_pb2.ScoreRequest:
    """Returns the request for the log probability of an output.

    Raises:
        InvalidArgumentError: an argument is of the wrong type or out of range.
        TypeError: there is no such option.
    """
    checks.require_known(options, ScoreOptions)
    request = generation_pb2.ScoreRequest(parameters=generation_parameters(prompt, **options))
    if isinstance(continuation, str):
        request.text = checks.text("continuation", continuation)
    elif continuation is not None:
        items = _listed("continuation", continuation, "text or token ids")
        request.token_ids.ids.extend([checks.token_id("continuation", item) for item in items])
        request.token_ids.SetInParent()
    return request


def tokenize_request(prompt: Prompt, tools: Sequence[AnyTool] | None) -> model_pb2.TokenizeRequest:
    """Returns the request for a prompt's token ids.

    Raises:
        InvalidArgumentError: the prompt is neither text nor a conversation, or a tool cannot be sent.
    """
    parameters = generation_parameters(prompt, tools=tools)
    if parameters.WhichOneof("prompt") == "token_ids":
        raise invalid_argument("prompt", "is token ids already")
    if parameters.WhichOneof("prompt") == "chat":
        return model_pb2.TokenizeRequest(chat=parameters.chat)
    return model_pb2.TokenizeRequest(text=parameters.text)


def _add_messages(chat: common_pb2.ChatPrompt, messages: Sequence[Any], argument: str) -> None:
    if not messages:
        raise invalid_argument(argument, "must not be empty")
    for position, message in enumerate(messages):
        place = f"{argument}[{position}]"
        if not isinstance(message, Mapping) or not _NEEDED <= message.keys() <= _NEEDED | _OF_TOOLS:
            extras = ", ".join(sorted(_OF_TOOLS))
            raise invalid_argument(place, f'must be {{"role": …, "content": …}}, with {extras} where tools are called')
        content = message["content"]
        calls = _listed(f"{place}.tool_calls", message.get("tool_calls") or (), "a list of calls")
        fields = {
            "role": checks.text(f"{place}.role", message["role"]),
            "content": "" if content is None and calls else checks.text(f"{place}.content", content),
        }
        for name in ("tool_call_id", "name"):
            if message.get(name) is not None:
                fields[name] = checks.text(f"{place}.{name}", message[name])
        called = [call_message(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls)]
        chat.messages.add(tool_calls=called, **fields)


def _listed(argument: str, values: Any, expected: str) -> list[Any]:
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise invalid_argument(argument, f"must be {expected}, not {type(values).__name__}")
    return list(values)


def _member(kind: type[E], argument: str, value: Any) -> E:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value.upper() in kind.__members__:
        return kind[value.upper()]
    choices = ", ".join(member.name.lower() for member in kind)
    raise invalid_argument(argument, f"must be one of {choices}, not {value!r}")
