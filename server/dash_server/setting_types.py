"""Types of settings that are written in a form of their own. Knows texts; knows no settings."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer
from pydantic_settings import NoDecode

from dash_runtime.actions import Action
from dash_server.scaling import WorkerRange


def parse_names(text: str) -> tuple[str, ...]:
    """Reads names with commas between them. Raises ValueError if one is missing or comes twice."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError("must be different names with commas between them")
    return names


def check_ray_address(address: str) -> str:
    """Returns the address. Raises ValueError if it has none of the forms that Ray knows."""
    if re.fullmatch(r"auto|(ray://)?[^/\s]+:\d+", address) is None:
        raise ValueError("must be auto, host:port or ray://host:port")
    return address


def parse_actions(text: str) -> tuple[str, ...]:
    """Reads names of actions. Raises ValueError if one is unknown, missing or comes twice."""
    names = parse_names(text.upper())
    if unknown := next((name for name in names if name not in Action.__members__), None):
        raise ValueError(f"has the unknown action {unknown!r}; known: {', '.join(Action.__members__)}")
    return names


RayAddress = Annotated[str, AfterValidator(check_ray_address)]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
LogFormat = Annotated[Literal["console", "json"], BeforeValidator(str.lower)]

# What pydantic-settings would decode is JSON, which none of these is.
Workers = Annotated[
    WorkerRange,
    NoDecode,
    BeforeValidator(lambda given: given if isinstance(given, WorkerRange) else WorkerRange.parse(str(given))),
    PlainSerializer(str),
]
Names = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(lambda given: parse_names(given) if isinstance(given, str) else given),
    PlainSerializer(",".join),
]
ActionNames = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(lambda given: parse_actions(given) if isinstance(given, str) else given),
    PlainSerializer(",".join),
]
