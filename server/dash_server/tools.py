"""Tools in chats: what the chat template gets of them, the grammar of their calls, and the calls in an output's text.

A call is written as Hermes and Qwen write it, which most open models' templates ask for: a JSON object of name and
arguments between <tool_call> and </tool_call>. Knows no request and no worker.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dash_api.v1 import common_pb2
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.errors import InvalidRequest
from dash_runtime.grammar import embedded_schema
from dash_server.text import TextTokenizer

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_NOTHING = '{"properties": {}, "additionalProperties": false}'
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CHOICES = {
    common_pb2.TOOL_CHOICE_UNSPECIFIED: common_pb2.TOOL_CHOICE_AUTO,
    **{number: number for number in common_pb2.ToolChoice.values()[1:]},
}


CheckGrammar = Callable[[Constraint], None]
"""Raises InvalidRequest: the grammar cannot be used."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that a reply may call. `choice` is AUTO or REQUIRED."""

    schemas: Mapping[str, dict[str, Any]]
    """The JSON schema of each one's arguments, by its name."""
    choice: int
    required: str | None
    are_parallel: bool
    """True if a reply may call several."""

    def constraint(self, tokenizer: TextTokenizer, check_grammar: CheckGrammar) -> Constraint:
        """Returns the constraint that keeps calls to the schemas.

        Raises:
            InvalidRequest: a schema cannot be used; the path is that of the tool, from the prompt on.
        """
        for place, schema in enumerate(self.schemas.values()):
            field = f"chat.tools[{place}].parameters_json_schema"
            check_grammar(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), field))
        opening, closing = (_terminal(marker, tokenizer) for marker in (_OPENING, _CLOSING))
        calls = [
            f"{_literal(_beginning(name))} %json {embedded_schema(schema)} {_literal('}' + chr(10))} {closing}"
            for name, schema in self.schemas.items()
            if self.required in (None, name)
        ]
        rules = [f"call: {' | '.join(f'call_{place}' for place in range(len(calls)))}"]
        rules += [f"call_{place}: {call}" for place, call in enumerate(calls)]
        if self.choice == common_pb2.TOOL_CHOICE_AUTO:
            # Text ends with the first opening: a token is part of no text; letters are, unless their rule is lazy.
            head = "opening" if opening.startswith("<") else "opening[lazy]"
            start = "(opening call)* TEXT" if self.are_parallel else "opening call | TEXT"
            rules += [f"start: {start}", f"{head}: TEXT {opening}", r"TEXT: /(.|\n)*/"]
        else:
            more = f' ("\\n" {opening} call)*' if self.are_parallel else ""
            rules.append(f"start: {opening} call{more}")
        return Constraint(ConstraintKind.LARK_GRAMMAR, "\n".join(["%llguidance {}", *rules]), "chat.tools")


def read_tools(chat: common_pb2.ChatPrompt, template: ChatTemplate, tokenizer: TextTokenizer) -> Tools | None:
    """Returns the tools that the reply may call; None: it may call none.

    Raises:
        InvalidRequest: a tool or the choice is wrong, or the model calls no tools. Paths begin with `chat`.
    """
    choice = _CHOICES.get(chat.tool_choice)
    if choice is None:
        raise InvalidRequest("chat.tool_choice", f"{chat.tool_choice} is not a ToolChoice")
    required = chat.required_tool if chat.HasField("required_tool") else None
    schemas: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(chat.tools):
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(f"chat.tools[{place}].name", "must have 1 to 64 letters, digits, _, . and -")
        if tool.name in schemas:
            raise InvalidRequest(f"chat.tools[{place}].name", "is that of an earlier tool")
        schemas[tool.name] = _arguments_schema(tool, f"chat.tools[{place}].parameters_json_schema")
    if choice == common_pb2.TOOL_CHOICE_REQUIRED and not schemas:
        raise InvalidRequest("chat.tool_choice", "needs tools to call")
    if required is not None and (choice != common_pb2.TOOL_CHOICE_REQUIRED or required not in schemas):
        raise InvalidRequest("chat.required_tool", "must be the name of a tool, with REQUIRED as tool_choice")
    if not schemas or choice == common_pb2.TOOL_CHOICE_NONE:
        return None
    if not template.takes_tools:
        raise InvalidRequest("chat.tools", "the model's chat template knows no tools")
    is_hidden = tokenizer.added_token_ids.get(_OPENING) in tokenizer.special_token_ids
    if is_hidden or _OPENING not in (template.source or ""):
        raise InvalidRequest("chat.tools", f"the model does not write calls between {_OPENING} and {_CLOSING}")
    are_parallel = required is None and (chat.parallel_tool_calls or not chat.HasField("parallel_tool_calls"))
    return Tools(schemas, choice, required, are_parallel)


def template_messages(chat: common_pb2.ChatPrompt) -> list[dict[str, Any]]:
    """Returns the messages as chat templates take them.

    Raises:
        InvalidRequest: the arguments of a call are no JSON object.
    """
    messages = []
    for place, message in enumerate(chat.messages):
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            entry["tool_calls"] = [
                _template_call(call, f"chat.messages[{place}].tool_calls[{number}]")
                for number, call in enumerate(message.tool_calls)
            ]
        entry |= {name: getattr(message, name) for name in ("tool_call_id", "name") if message.HasField(name)}
        messages.append(entry)
    return messages


def template_tools(chat: common_pb2.ChatPrompt, tools: Tools) -> list[dict[str, Any]]:
    """Returns the tools as chat templates take them."""
    descriptions = {tool.name: tool.description for tool in chat.tools}
    return [
        {
            "type": "function",
            "function": {"name": name, "description": descriptions[name], "parameters": schema},
        }
        for name, schema in tools.schemas.items()
    ]


def calls_as_text(message: common_pb2.ChatMessage) -> str:
    """Returns the calls of a message as a model writes them."""
    return "".join(
        f"\n{_OPENING}{_beginning(call.name)}{call.arguments_json}}}\n{_CLOSING}" for call in message.tool_calls
    )


class ToolCallReader:
    """Takes the calls out of an output's text, which comes in pieces.

    Args:
        id_prefix: what the ids of the calls begin with.
    """

    def __init__(self, id_prefix: str) -> None:
        self._id_prefix = id_prefix
        self._held = ""
        self._is_inside = False
        self._num_searched = 0
        self._num_calls = 0

    def push(self, text: str) -> tuple[str, list[common_pb2.ToolCall]]:
        """Returns the text outside calls that is certain by now, and the calls that are complete."""
        self._held += text
        outside = ""
        calls: list[common_pb2.ToolCall] = []
        while True:
            if self._is_inside:
                call = self._complete_call()
                if call is None:
                    return outside, calls
                calls.append(call)
            else:
                if self._num_calls:
                    self._held = self._held.lstrip()
                before, opening, after = self._held.partition(_OPENING)
                if not opening:
                    num_held = next(n for n in range(len(_OPENING) - 1, -1, -1) if before.endswith(_OPENING[:n]))
                    end = len(before) - num_held
                    self._held = before[end:]
                    return outside + before[:end], calls
                outside += before
                self._held, self._is_inside, self._num_searched = after, True, 0

    def finish(self) -> str:
        """Returns the text held back, at the end of the output: a call that was cut off is text."""
        return (_OPENING if self._is_inside else "") + self._held

    def _complete_call(self) -> common_pb2.ToolCall | None:
        # A string among the arguments may hold what closes a call.
        while (end := self._held.find(_CLOSING, self._num_searched)) >= 0:
            self._num_searched = end + len(_CLOSING)
            try:
                content = json.loads(self._held[:end])
            except ValueError:
                continue
            self._held, self._is_inside = self._held[self._num_searched :], False
            self._num_calls += 1
            arguments = json.dumps(content["arguments"], ensure_ascii=False)
            call_id = f"{self._id_prefix}{self._num_calls}"
            return common_pb2.ToolCall(id=call_id, name=content["name"], arguments_json=arguments)
        self._num_searched = max(self._num_searched, len(self._held) - len(_CLOSING) + 1)
        return None


def _arguments_schema(tool: common_pb2.Tool, field: str) -> dict[str, Any]:
    schema = Constraint(ConstraintKind.JSON_SCHEMA, tool.parameters_json_schema or _NOTHING, field).json()
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise InvalidRequest(field, "must be the schema of an object")
    return {"type": "object", **schema}


def _template_call(call: common_pb2.ToolCall, place: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments_json)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{place}.arguments_json", "must be a JSON object")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _beginning(name: str) -> str:
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


def _terminal(marker: str, tokenizer: TextTokenizer) -> str:
    """Returns a marker in a grammar: by its token if it has one of its own, which llguidance may not take for text."""
    token_id = tokenizer.added_token_ids.get(marker)
    return _literal(marker) if token_id is None else f"<[{token_id}]>"


def _literal(text: str) -> str:
    return json.dumps(text)
