"""Describes what a request may ask of its output's text: a schema, a pattern, a grammar or a choice.

Imports no torch. Checks what needs no grammar library; `engine/constraints.py` does the rest.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dash_runtime.errors import InvalidRequest


class ConstraintKind(StrEnum):
    """The kinds, by the names of their fields in the request."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK_GRAMMAR = "lark_grammar"
    CHOICES = "choices"


@dataclass(frozen=True, slots=True)
class Constraint:
    """A rule for the whole output.

    Args:
        text: a regular expression, a grammar or, for the other kinds, JSON.
        field: the request's field that asks for it; None: the one of its kind.

    Raises:
        InvalidRequest: the text is empty, or not the JSON that its kind asks for.
    """

    kind: ConstraintKind
    text: str
    field: str | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise self.refusal("must not be empty")
        if self.kind is ConstraintKind.JSON_SCHEMA and not isinstance(self.json(), (dict, bool)):
            raise self.refusal("must be a JSON object or boolean")
        if self.kind is ConstraintKind.CHOICES and not (self.json() and all(self.json())):
            raise self.refusal("must be strings that are not empty, one or more")

    def json(self) -> Any:
        """Returns what the text, which is JSON, stands for."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise self.refusal(f"is not JSON: {reason}") from None

    def refusal(self, description: str) -> InvalidRequest:
        """Returns the error that names this constraint's field."""
        return InvalidRequest(self.field or f"constraint.{self.kind.value}", description)
