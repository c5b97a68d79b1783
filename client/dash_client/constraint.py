"""The ways to say what an output has to be, and how to read one. Knows no protobuf.

Imports no pydantic: whoever passes a model class has it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Any


@dataclass(frozen=True, slots=True)
class LarkGrammar:
    """A grammar for an output, in [llguidance's dialect of
    Lark](https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md)."""

    text: str


Constraint = Mapping[str, Any] | type[Any] | Pattern[str] | Sequence[str] | LarkGrammar
"""A rule for an output: a JSON schema as a dict, a pydantic model class, a compiled pattern for the whole text, a
list of texts of which it is one, or a `LarkGrammar`."""


def is_model_class(constraint: Any) -> bool:
    """True for a class of pydantic models."""
    return isinstance(constraint, type) and hasattr(constraint, "model_json_schema")


def parse_output(text: str, constraint: Constraint | None) -> Any:
    """Returns the text as what the constraint says that it is.

    Raises:
        ValueError: it is not, because the output was cut off.
    """
    if isinstance(constraint, type) and is_model_class(constraint):
        return constraint.model_validate_json(text)
    return json.loads(text) if isinstance(constraint, Mapping) else text
