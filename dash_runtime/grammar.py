"""Turns constraints into llguidance's grammars, and says what is wrong with those that are none.

Needs no tokenizer and imports no torch, so that a server can refuse a constraint before it has done any work for it.
"""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, grammar_from, regex_to_lark

from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.files.wording import one_line

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
"""Bounds a grammar that was made to explode: to about 100 ms for its start, 15 ms for a token, and 40 MB."""
_WHITESPACE: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written as Python writes it. Free to choose, a small model may write blanks for ever; and what is forced need
not be chosen."""
_MOST_TRIED_CHARS = 1 << 18
"""Size of all parts of a refused schema that are tried alone, to find which one is wrong."""


def grammar_of(constraint: Constraint) -> str:
    """Returns the grammar, which may still be wrong."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return _schema_grammar(constraint.text)
        case ConstraintKind.REGEX:
            pattern = regex_to_lark(constraint.text, use_ascii="d")
            return LLMatcher.grammar_from_lark(f"start: /{pattern}/")
        case ConstraintKind.LARK_GRAMMAR:
            return LLMatcher.grammar_from_lark(constraint.text)
        case ConstraintKind.CHOICES:
            return grammar_from("choice", constraint.text)


def embedded_schema(schema: dict[str, Any]) -> str:
    """Returns a schema as it follows `%json` in a Lark grammar."""
    return json.dumps({**schema, "x-guidance": _WHITESPACE})


def check_grammar(constraint: Constraint) -> None:
    """Checks all but what needs a tokenizer.

    Raises:
        InvalidRequest: it cannot be used; the description says why and, in a schema, where.
    """
    reason = _error_in(grammar_of(constraint))
    if reason is not None and constraint.kind is ConstraintKind.JSON_SCHEMA:
        reason = f"{_place_of_error(constraint.json())}: {reason}"
    if reason is not None:
        raise constraint.refusal(reason)


def _schema_grammar(text: str) -> str:
    has_options = text.lstrip().startswith("{")  # the other schemas are true and false
    return LLMatcher.grammar_from_json_schema(text, _WHITESPACE if has_options else None)


def _error_in(grammar: str) -> str | None:
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return one_line(messages[0]) if is_wrong else None


def _place_of_error(schema: Any) -> str:
    """Returns the innermost part of a schema that is refused by itself, as a JSON pointer; `#` is the whole."""
    names = ("$defs", "definitions") if isinstance(schema, dict) else ()
    shared = {name: schema[name] for name in names if name in schema}
    place, num_chars = "#", 0
    parts = list(_subschemas(schema))
    while parts:
        name, part = parts.pop(0)
        text = json.dumps(part if isinstance(part, bool) else {**shared, **part})
        num_chars += len(text)
        if num_chars > _MOST_TRIED_CHARS:
            break
        if _error_in(_schema_grammar(text)) is not None:
            place += f"/{name}"
            parts = list(_subschemas(part))
    return place


def _subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yields the schemas directly inside a schema, each with the way to it."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            inner: Iterable[tuple[Any, Any]] = value.items()
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            inner = enumerate(value)
        elif key in ("items", "additionalProperties", "not"):
            inner = [("", value)]
        else:
            continue
        for name, part in inner:
            if isinstance(part, (dict, bool)):
                escaped = str(name).replace("~", "~0").replace("/", "~1")
                yield (f"{key}/{escaped}" if name != "" else key), part
