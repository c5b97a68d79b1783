"""Reads questions with known answers from the user's JSONL files.

A file holds one kind of record: `{"question", "choices", "answer": place of the right one}` or
`{"question", "answer": text}`. Other fields are ignored. Knows files; knows no tokenizer and no model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with several answers, one of them right."""

    question: str
    choices: tuple[str, ...]
    answer: int
    """Place of the right choice, from 0."""


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """A question whose answer the model writes."""

    question: str
    answer: str


def read_tasks(path: Path) -> list[ChoiceQuestion] | list[OpenQuestion]:
    """Returns the file's records in its order, all of one kind. Empty lines are ignored.

    Raises:
        ConfigError: the file cannot be read, is empty, mixes the kinds, or has a record of another form; the message
            names file and line.
    """
    choice_questions: list[ChoiceQuestion] = []
    open_questions: list[OpenQuestion] = []
    for number, line in enumerate(_lines(path), 1):
        place = f"{path}, line {number}"
        record = _record(place, line)
        if record is None:
            continue
        if "choices" in record:
            choice_questions.append(_choice_question(place, record))
        else:
            open_questions.append(OpenQuestion(_text(place, record, "question"), _text(place, record, "answer")))
        if choice_questions and open_questions:
            raise _error(place, "is of another kind than the lines before: with or without choices, not both")
    if not choice_questions and not open_questions:
        raise ConfigError("tasks", f"{path} has no records")
    return choice_questions or open_questions


def _error(place: str, description: str) -> ConfigError:
    return ConfigError("tasks", f"{place} {description}")


def _lines(path: Path) -> list[bytes]:
    try:
        # Bytes, so that a line that is not UTF-8 can be numbered and U+2028 in a text ends no line.
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigError("tasks", f"{path} cannot be read: {error.strerror or error}") from None


def _record(place: str, line: bytes) -> dict[str, Any] | None:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise _error(place, "is not UTF-8") from None
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise _error(place, "is not JSON") from None
    if not isinstance(record, dict):
        raise _error(place, "is not an object")
    return record


def _choice_question(place: str, record: dict[str, Any]) -> ChoiceQuestion:
    question = _text(place, record, "question")
    choices = record["choices"]
    if not isinstance(choices, list):
        raise _error(place, "has choices that are not a list")
    if len(choices) < 2:
        raise _error(place, f"needs at least two choices, has {len(choices)}")
    texts = tuple(_checked_text(place, f"choice {number}", choice) for number, choice in enumerate(choices))
    if "answer" not in record:
        raise _error(place, "has no answer")
    answer = record["answer"]
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise _error(place, f"has choices, so its answer must be the right one's place, from 0, not {answer!r:.80}")
    if not 0 <= answer < len(texts):
        raise _error(place, f"has answer {answer!r:.20}, but its choices are 0 to {len(texts) - 1}")
    return ChoiceQuestion(question, texts, answer)


def _text(place: str, record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise _error(place, f"has no {name}")
    return _checked_text(place, name, record[name])


def _checked_text(place: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _error(place, f"must have a text for {name}, not {value!r:.80}")
    if not value.strip():
        raise _error(place, f"has nothing in its {name}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise _error(place, f"has half a character (a lone surrogate) in its {name}") from None
    return value
