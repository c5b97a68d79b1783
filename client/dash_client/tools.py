"""Tools that a reply may call, and its calls. Knows no protobuf.

Imports no pydantic: whoever passes a model class has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; you run it."""

    name: str
    """1 to 64 letters, digits, `_`, `.` and `-`."""
    description: str = ""
    """A sentence for the model on what the function does."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The JSON schema of its arguments. Objects in it take no properties but those that they name, unless they say
    `additionalProperties`."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The call of a tool. Its arguments keep the tool's schema."""

    id: str
    """For the tool's answer: `{"role": "tool", "tool_call_id": call.id, "content": …}`."""
    name: str
    arguments: dict[str, Any]


AnyTool = Tool | type[Any] | Mapping[str, Any]
"""A `Tool`, a pydantic model class (by its name, docstring and schema), or a dict in OpenAI's form."""
