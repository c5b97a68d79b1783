"""Builds protobuf requests from a caller's arguments. Shared by the sync and the async client.

Checks what cannot be put on the wire; what is in range is the server's to say.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar, Unpack

from google.protobuf.message import Message

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_client.errors import invalid_argument
from dash_client.types import Action, GenerationOptions, Mode, Prompt

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
    """The message for a prompt and options.

    Raises:
        InvalidArgumentError: a value cannot be sent; its `field_violations` name the argument.
        TypeError: there is no such option.
    """
    unknown = sorted(options.keys() - GenerationOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}")
    parameters = generation_pb2.GenerationParameters()
    _set_prompt(parameters, prompt)
    given = {name: value for name, value in options.items() if value is not None}
    for group, names in (
        (parameters.sampling, _SAMPLING),
        (parameters.stopping, _STOPPING),
        (parameters.skip, _SKIP),
        (parameters.output, _OUTPUT),
    ):
        for name in names:
            if name in given:
                _set_field(group, name, given[name])
    _set_collections(parameters, given)
    if "mode" in given:
        parameters.skip.mode = _MODES[_member(Mode, "mode", given["mode"])]
    if "fixed_action" in given:
        action = _member(Action, "fixed_action", given["fixed_action"])
        # Action numbers are the protocol's own.
        _set_field(parameters.skip, "fixed_action", int(action))
    return parameters


def tokenize_request(prompt: Prompt) -> model_pb2.TokenizeRequest:
    """The message that asks for a prompt's token ids.

    Raises:
        InvalidArgumentError: the prompt is neither text nor a conversation.
    """
    parameters = generation_pb2.GenerationParameters()
    _set_prompt(parameters, prompt)
    if parameters.WhichOneof("prompt") == "token_ids":
        raise invalid_argument("prompt", "is token ids already")
    if parameters.WhichOneof("prompt") == "chat":
        return model_pb2.TokenizeRequest(chat=parameters.chat)
    return model_pb2.TokenizeRequest(text=parameters.text)


def decisions_request(request_id: str) -> model_pb2.GetDecisionsRequest:
    """The message that asks for a request's decisions.

    Raises:
        InvalidArgumentError: the id is no text.
    """
    request = model_pb2.GetDecisionsRequest()
    _set_field(request, "request_id", request_id)
    return request


def _set_prompt(parameters: generation_pb2.GenerationParameters, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set_field(parameters, "text", prompt, argument="prompt")
        return
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        raise invalid_argument("prompt", f"must be text, token ids or a list of messages, not {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    if not items:
        raise invalid_argument("prompt", "must not be empty")
    if isinstance(items[0], Mapping):
        for position, message in enumerate(items):
            _add_chat_message(parameters.chat, position, message)
    else:
        _extend_ids(parameters.token_ids.ids, "prompt", items)


def _add_chat_message(chat: common_pb2.ChatPrompt, position: int, message: Any) -> None:
    argument = f"prompt[{position}]"
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        raise invalid_argument(argument, 'must be {"role": …, "content": …}')
    added = chat.messages.add()
    for name in ("role", "content"):
        _set_field(added, name, message[name], argument=f"{argument}.{name}")


def _set_collections(parameters: generation_pb2.GenerationParameters, given: Mapping[str, Any]) -> None:
    if "stop" in given:
        stop = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
        try:
            parameters.stopping.stop_strings.extend(stop)
        except (TypeError, ValueError) as error:
            raise invalid_argument("stop", f"must be a string or a list of strings: {error}") from None
    if "stop_token_ids" in given:
        _extend_ids(parameters.stopping.stop_token_ids, "stop_token_ids", given["stop_token_ids"])
    if "logit_bias" in given:
        try:
            for token_id, bias in dict(given["logit_bias"]).items():
                parameters.sampling.logit_bias[operator.index(token_id)] = bias
        except (TypeError, ValueError) as error:
            raise invalid_argument("logit_bias", f"must map token ids to numbers: {error}") from None


def _extend_ids(ids: Any, argument: str, values: Sequence[Any]) -> None:
    try:
        # index() takes the integers of numpy and the like, and refuses 1.0 and "1".
        ids.extend(operator.index(value) for value in values)
    except (TypeError, ValueError) as error:
        raise invalid_argument(argument, f"must hold token ids, integers of 0 or more: {error}") from None


def _set_field(message: Message, name: str, value: Any, argument: str | None = None) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise invalid_argument(argument or name, f"cannot be {value!r}: {error}") from None


def _member(kind: type[E], argument: str, value: Any) -> E:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value.upper() in kind.__members__:
        return kind[value.upper()]
    choices = ", ".join(member.name.lower() for member in kind)
    raise invalid_argument(argument, f"must be one of {choices}, not {value!r}")
