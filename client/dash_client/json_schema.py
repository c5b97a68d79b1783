"""Closes JSON schemas. Knows no protobuf."""

from typing import Any

_BY_NAME = ("properties", "$defs", "definitions", "patternProperties")
_ALTERNATIVES = ("anyOf", "oneOf", "prefixItems")


def closed(schema: Any) -> Any:
    """Returns a schema without room for properties that its objects do not name, unless they say
    `additionalProperties`. A small model would fill that room for ever, and nobody asked for what it holds."""
    if not isinstance(schema, dict):
        return schema
    parts = dict(schema)
    for name, part in schema.items():
        if name in _BY_NAME and isinstance(part, dict):
            parts[name] = {key: closed(value) for key, value in part.items()}
        elif name in _ALTERNATIVES and isinstance(part, list):
            parts[name] = [closed(value) for value in part]
        elif name == "items":
            parts[name] = closed(part)
    # The parts of `allOf` add to each other's properties, and so do these alternatives to those beside them.
    if isinstance(schema.get("properties"), dict) and not schema.keys() & {"allOf", "anyOf", "oneOf", "$ref"}:
        parts.setdefault("additionalProperties", False)
    return parts
