"""Renders a conversation as the text that the model was trained on, by the chat template in its folder.

The result equals that of transformers' `apply_chat_template`. The template is code from a model's author, so it runs in
Jinja's sandbox. Knows no tokenizer. Imports no torch, because the server process uses this module too.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dash_runtime.errors import CorruptCheckpoint, InvalidRequest
from dash_runtime.files.json_file import read_json_object, read_text
from dash_runtime.files.wording import one_line, quoted

Message = tuple[str, str] | Mapping[str, Any]
"""One message: role and content, or an object as transformers takes it, which may have `tool_calls` and more."""

_FIELD = "chat"
_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class ChatTemplate:
    """The chat template of one model, which may have none."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        """Raises:
        ValueError: `source` is not a template; says why in one line.
        """
        self.source = source
        """The template's text; None: the model has no template."""
        self._special_tokens = special_tokens
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{one_line(error.message)} in line {error.lineno}") from None
        except Exception as error:  # Jinja generates Python, and compiling that has errors of its own
            raise ValueError(f"{type(error).__name__} {one_line(error)}") from None

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """Reads the template in `folder`: chat_template.jinja, or else tokenizer_config.json's.

        Raises:
            CheckpointNotFound: a file is a link to nothing.
            CorruptCheckpoint: a file is there but cannot be used.
        """
        config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = _read_json(config_file)
        map_file = folder / "special_tokens_map.json"
        special_tokens = _special_tokens(_read_json(map_file), map_file) | _special_tokens(config, config_file)
        file = template_file if os.path.lexists(template_file) else config_file
        try:
            source = read_text(file) if file is template_file else _default_template(config)
            return cls(source, special_tokens)
        except ValueError as error:
            raise CorruptCheckpoint(f"{file}: the chat template cannot be used: {error}") from None

    @cached_property
    def takes_tools(self) -> bool:
        """True if the template reads the tools that it is given."""
        return self.source is not None and "tools" in jinja2.meta.find_undeclared_variables(
            _environment().parse(self.source)
        )

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Returns the prompt for these messages, ready for the assistant's answer.

        Args:
            messages: oldest first.
            tools: in OpenAI's form, which transformers takes too.

        Raises:
            InvalidRequest: there is no template, there are no messages, a role is empty, or the template
                refuses the conversation.
        """
        return self._render(messages, tools, add_generation_prompt=True)

    def render_conversation(self, messages: Sequence[Message]) -> str:
        """Returns the text of these messages, answers included, as training reads it.

        Raises:
            InvalidRequest: as for `render`.
        """
        return self._render(messages, None, add_generation_prompt=False)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        if self._template is None:
            raise InvalidRequest(_FIELD, "the model has no chat template; send `text` or `token_ids`")
        if not messages:
            raise InvalidRequest(f"{_FIELD}.messages", "must not be empty")
        whole = [_whole(message) for message in messages]
        for position, message in enumerate(whole):
            if not message["role"]:
                raise InvalidRequest(f"{_FIELD}.messages[{position}].role", "must not be empty")
        try:
            return self._template.render(
                messages=whole,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(_FIELD, f"the model's chat template refuses it: {error}") from error
        except Exception as error:  # a template is code: anything it raises is about this conversation
            raise InvalidRequest(_FIELD, f"the model's chat template fails on it: {type(error).__name__}") from error


def _whole(message: Message) -> Mapping[str, Any]:
    return message if isinstance(message, Mapping) else dict(zip(("role", "content"), message, strict=True))


class _GenerationTag(jinja2.ext.Extension):
    """Renders the body of `{% generation %}`, which marks the assistant's part for training."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if os.path.lexists(path) else {}


def _special_tokens(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Returns `bos_token`, `eos_token` and the like, which some files write as objects."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
        elif name in _TOKENS and value is not None:
            raise CorruptCheckpoint(f"{file}: {name} must be a text, got {quoted(value)}")
    return tokens


def _default_template(config: Mapping[str, Any]) -> str | None:
    """Returns a single template, or the one called `default` in a list of named templates.

    Raises:
        ValueError: it is neither.
    """
    templates = config.get("chat_template")
    if isinstance(templates, list):
        if not all(
            isinstance(one, dict) and isinstance(one.get("name"), str) and "template" in one for one in templates
        ):
            raise ValueError("it is no list of named templates")
        templates = {one["name"]: one["template"] for one in templates}
    if isinstance(templates, dict):
        templates = templates.get("default")
    if templates is not None and not isinstance(templates, str):
        raise ValueError(f"it is no text but {quoted(templates)}")
    return templates
