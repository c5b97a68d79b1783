"""Builds protobuf requests from a caller's arguments. Shared by both clients.

Knows the field of each option; `checks` knows its type and range. Sends nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar, Unpack

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_client import checks
from dash_client.errors import invalid_argument
from dash_client.types import Action, ChatMessage, GenerationOptions, Mode, Prompt

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_STOPPING = ("max_new_tokens", "ignore_eos")
_SKIP = ("compute_budget", "policy_name", "draft_length")
_OUTPUT = ("return_decisions", "logprobs", "trace")

E = TypeVar("E", bound=Enum)

_MODES = {mode: getattr(common_pb2, f"MODE_{mode.name}") for mode in Mode}


def generation_parameters(prompt: Prompt, **options: Unpack[GenerationOptions]) -> generation_pb2.GenerationParameters:
    """Returns the message for a prompt and options.

    Raises:
        InvalidArgumentError: a value is of the wrong type or out of range; its `field_violations` name the argument.
        TypeError: there is no such option.
    """
    return with_prompt(option_parameters(**options), prompt)


def option_parameters(**options: Unpack[GenerationOptions]) -> generation_pb2.GenerationParameters:
    """Returns the message for options alone. Raises the same as `generation_parameters`."""
    unknown = sorted(options.keys() - GenerationOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}")
    parameters = generation_pb2.GenerationParameters()
    given = {name: value for name, value in options.items() if value is not None}
    for group, names in (
        (parameters.sampling, _SAMPLING),
        (parameters.stopping, _STOPPING),
        (parameters.skip, _SKIP),
        (parameters.output, _OUTPUT),
    ):
        for name in names:
            if name in given:
                setattr(group, name, checks.option(name, given[name]))
    _set_collections(parameters, given)
    if "mode" in given:
        parameters.skip.mode = _MODES[_member(Mode, "mode", given["mode"])]
    if "fixed_action" in given:
        # An Action's number is the protocol's own, which mypy cannot know.
        number: Any = int(_member(Action, "fixed_action", given["fixed_action"]))
        parameters.skip.fixed_action = number
    return parameters


def with_prompt(
    parameters: generation_pb2.GenerationParameters, prompt: Prompt, *, argument: str = "prompt"
) -> generation_pb2.GenerationParameters:
    """Sets the message's prompt, and returns the message. `argument` is the caller's name for the prompt.

    Raises:
        InvalidArgumentError: it is not a prompt.
    """
    if isinstance(prompt, str):
        parameters.text = checks.text(argument, prompt)
        return parameters
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        kind = type(prompt).__name__
        raise invalid_argument(argument, f"must be text, token ids or a list of messages, not {kind}")
    items: list[Any] = list(prompt)
    if not items:
        raise invalid_argument(argument, "must not be empty")
    if isinstance(items[0], Mapping):
        _add_messages(parameters.chat, items, argument)
    else:
        parameters.token_ids.ids.extend([checks.token_id(argument, item) for item in items])
    return parameters


def chat_prompt(messages: str | Sequence[ChatMessage] | Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, Any]]:
    """Returns a conversation as a prompt; a string is one user message.

    Raises:
        InvalidArgumentError: it is neither a string nor a list of messages.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, (bytes, bytearray, Mapping)) or not isinstance(messages, Iterable):
        kind = type(messages).__name__
        raise invalid_argument("messages", f'must be text or a list of {{"role": …, "content": …}}, not {kind}')
    listed: list[Mapping[str, Any]] = list(messages)
    if listed and not isinstance(listed[0], Mapping):
        raise invalid_argument("messages[0]", 'must be {"role": …, "content": …}')
    return listed


def tokenize_request(prompt: Prompt) -> model_pb2.TokenizeRequest:
    """Returns the request for a prompt's token ids.

    Raises:
        InvalidArgumentError: the prompt is neither text nor a conversation.
    """
    parameters = with_prompt(generation_pb2.GenerationParameters(), prompt)
    if parameters.WhichOneof("prompt") == "token_ids":
        raise invalid_argument("prompt", "is token ids already")
    if parameters.WhichOneof("prompt") == "chat":
        return model_pb2.TokenizeRequest(chat=parameters.chat)
    return model_pb2.TokenizeRequest(text=parameters.text)


def policy_request(name: str | None) -> model_pb2.GetPolicyRequest:
    """Returns the request for a policy, by default the server's default one.

    Raises:
        InvalidArgumentError: the name is not a string.
    """
    return model_pb2.GetPolicyRequest(name=None if name is None else checks.text("name", name))


def decisions_request(request_id: str) -> model_pb2.GetDecisionsRequest:
    """Returns the request for the recorded decisions of an earlier request.

    Raises:
        InvalidArgumentError: the id is not a string.
    """
    return model_pb2.GetDecisionsRequest(request_id=checks.text("request_id", request_id))


def _add_messages(chat: common_pb2.ChatPrompt, messages: Sequence[Any], argument: str) -> None:
    for position, message in enumerate(messages):
        place = f"{argument}[{position}]"
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise invalid_argument(place, 'must be {"role": …, "content": …}')
        role = checks.text(f"{place}.role", message["role"])
        chat.messages.add(role=role, content=checks.text(f"{place}.content", message["content"]))


def _set_collections(parameters: generation_pb2.GenerationParameters, given: Mapping[str, Any]) -> None:
    if "stop" in given:
        stop = [given["stop"]] if isinstance(given["stop"], str) else _listed("stop", given["stop"], "strings")
        for value in stop:
            if not checks.text("stop", value):
                raise invalid_argument("stop", "must not hold an empty string")
        parameters.stopping.stop_strings.extend(stop)
    if "stop_token_ids" in given:
        values = _listed("stop_token_ids", given["stop_token_ids"], "token ids")
        parameters.stopping.stop_token_ids.extend([checks.token_id("stop_token_ids", value) for value in values])
    if "logit_bias" in given:
        if not isinstance(given["logit_bias"], Mapping):
            raise invalid_argument("logit_bias", "must map token ids to numbers")
        for key, value in given["logit_bias"].items():
            token_id = checks.token_id("logit_bias", key)
            parameters.sampling.logit_bias[token_id] = checks.number("logit_bias", value, f"logit_bias[{token_id}]")


def _listed(argument: str, values: Any, what: str) -> list[Any]:
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise invalid_argument(argument, f"must be a list of {what}, not {type(values).__name__}")
    return list(values)


def _member(kind: type[E], argument: str, value: Any) -> E:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value.upper() in kind.__members__:
        return kind[value.upper()]
    choices = ", ".join(member.name.lower() for member in kind)
    raise invalid_argument(argument, f"must be one of {choices}, not {value!r}")
