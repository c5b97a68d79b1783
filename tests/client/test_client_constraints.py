"""Rules for an output, as a caller says them, as they go over the wire, and as answers are read by them."""

import json
import re

import pytest
from fake_dash_server import FakeDashServer, delta, finished, started
from pydantic import BaseModel

from dash_api.v1 import generation_pb2
from dash_client import Constraint, DashClient, LarkGrammar
from dash_client.requests import generation_parameters


class Person(BaseModel):
    name: str
    age: int


PERSON = Person.model_json_schema()


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"type": "integer"}, generation_pb2.Constraint(json_schema='{"type": "integer"}')),
        (Person, generation_pb2.Constraint(json_schema=json.dumps({**PERSON, "additionalProperties": False}))),
        (re.compile("a.b"), generation_pb2.Constraint(regex="a.b")),
        (re.compile("a.b", re.DOTALL | re.IGNORECASE), generation_pb2.Constraint(regex="(?is)a.b")),
        (("a", "b"), generation_pb2.Constraint(choices=generation_pb2.Choices(texts=["a", "b"]))),
        (LarkGrammar('start: "a"'), generation_pb2.Constraint(lark_grammar='start: "a"')),
    ],
)
def test_a_constraint_is_said_in_pythons_own_ways(constraint: Constraint, expected: generation_pb2.Constraint) -> None:
    assert generation_parameters("x", constraint=constraint).constraint == expected


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_is_parsed_as_what_was_asked_for(is_streamed: bool) -> None:
    with FakeDashServer() as server, DashClient(server.target) as client:

        def parsed(text: str, constraint: Constraint | None) -> object:
            server.script = [started(), delta(text, [1]), finished(1)]
            answer = client.stream("x", constraint=constraint).final() if is_streamed else None
            return (answer or client.generate("x", constraint=constraint)).parsed

        assert parsed('{"name": "Ann", "age": 3}', Person) == Person(name="Ann", age=3)
        assert parsed('{"name": "Ann", "age": 3}', Person.model_json_schema()) == {"name": "Ann", "age": 3}
        assert parsed("yes", ["yes", "no"]) == "yes"
        assert parsed("a", None) == "a"
        for constraint in (Person, {"type": "object"}):
            with pytest.raises(ValueError, match=r"JSON|Unterminated"):
                parsed('{"name": "An', constraint)
