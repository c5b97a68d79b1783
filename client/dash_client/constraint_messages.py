"""Turns what an output has to be, said in one of Python's own ways, into the message. Knows no calls and no answers."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dash_api.v1 import generation_pb2
from dash_client import checks
from dash_client.constraint import LarkGrammar, is_model_class
from dash_client.errors import invalid_argument
from dash_client.json_schema import closed

_FLAGS = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s", re.VERBOSE: "x"}
_KINDS = "a JSON schema as a dict, a pydantic model class, a compiled re pattern, a list of texts or a LarkGrammar"


def constraint_message(constraint: Any) -> generation_pb2.Constraint:
    """Returns the message for the option `constraint`.

    Raises:
        InvalidArgumentError: it is none of the kinds, or cannot be sent.
    """
    message = generation_pb2.Constraint
    if is_model_class(constraint):
        constraint = closed(constraint.model_json_schema())
    if isinstance(constraint, Mapping):
        try:
            return message(json_schema=json.dumps(constraint, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise invalid_argument("constraint", f"is not a JSON schema: {error}") from None
    if isinstance(constraint, re.Pattern):
        return message(regex=_pattern(constraint))
    if isinstance(constraint, LarkGrammar):
        return message(lark_grammar=checks.text("constraint", constraint.text))
    if isinstance(constraint, Sequence) and not isinstance(constraint, (str, bytes)) and constraint:
        texts = [checks.text(f"constraint[{place}]", text) for place, text in enumerate(constraint)]
        return message(choices=generation_pb2.Choices(texts=texts))
    raise invalid_argument("constraint", f"must be {_KINDS}, not {type(constraint).__name__}")


def _pattern(pattern: re.Pattern[Any]) -> str:
    if not isinstance(pattern.pattern, str):
        raise invalid_argument("constraint", "must be a pattern of text, not of bytes")
    letters = "".join(letter for flag, letter in _FLAGS.items() if pattern.flags & flag)
    text = checks.text("constraint", pattern.pattern)
    return f"(?{letters}){text}" if letters else text
