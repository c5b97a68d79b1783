"""Reads questions with known answers from the user's JSONL files.

A file holds one kind of record: `{"question", "choices", "answer": place of the right one}`,
`{"question", "answer": text}`, or `{"question", "tests": Python statements}`. The last one also comes as two known sets
have it: `{"prompt", "test", "entry_point"}` (HumanEval's form) and `{"text" or "prompt", "test_list"}` (MBPP's). Other
fields are ignored. Knows files; knows no tokenizer and no model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

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


@dataclass(frozen=True, slots=True)
class ProgramQuestion:
    """A question whose answer is a Python program."""

    question: str
    tests: str
    """Code that runs after the program's own, and fails if that is wrong."""
    beginning: str = ""
    """Code that the program goes on from if it does not define `entry_point` itself."""
    entry_point: str = ""

    def program(self, code: str) -> str:
        """Returns an answer's code with what belongs before and after it."""
        is_whole = not self.entry_point or f"def {self.entry_point}(" in code
        return f"{'' if is_whole else self.beginning}{code}\n\n{self.tests}\n"


Question: TypeAlias = ChoiceQuestion | OpenQuestion | ProgramQuestion


def read_tasks(path: Path) -> list[Question]:
    """Returns the file's records in its order, all of one kind; of a folder those of its .jsonl files, by their names.
    Empty lines are ignored.

    Raises:
        ConfigError: the file cannot be read, is empty, mixes the kinds, or has a record of another form; the message
            names file and line.
    """
    questions: list[Question] = []
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(_lines(file), 1):
            place = f"{file}, line {number}"
            record = _record(place, line)
            if record is None:
                continue
            questions.append(_question(place, record))
            if type(questions[-1]) is not type(questions[0]):
                raise _error(
                    place, "is of another kind than the lines before: with choices, with tests or with neither"
                )
    if not questions:
        raise ConfigError("tasks", f"{path} has no records")
    return questions


def _question(place: str, record: dict[str, Any]) -> Question:
    if "choices" in record:
        return _choice_question(place, record)
    if "entry_point" in record:
        beginning, entry_point = _text(place, record, "prompt"), _text(place, record, "entry_point")
        question = f"Complete this Python function. Answer with all of its code.\n```python\n{beginning}\n```"
        tests = f"{_text(place, record, 'test')}\ncheck({entry_point})"
        return ProgramQuestion(question, tests, beginning, entry_point)
    if "test_list" in record:
        statements = _statements(place, record, "test_list")
        asked = _text(place, record, "text" if "text" in record else "prompt")
        question = f"{asked}\nWrite a Python function that passes these tests:\n```python\n{statements}\n```"
        imports = _statements(place, record, "test_imports") if record.get("test_imports") else ""
        return ProgramQuestion(question, f"{imports}\n{statements}".lstrip())
    if "tests" in record:
        return ProgramQuestion(_text(place, record, "question"), _statements(place, record, "tests"))
    return OpenQuestion(_text(place, record, "question"), _text(place, record, "answer"))


def _statements(place: str, record: dict[str, Any], name: str) -> str:
    statements = record[name]
    if not isinstance(statements, list) or not statements:
        raise _error(place, f"must have a list of Python statements for {name}")
    return "\n".join(_checked_text(place, f"{name} {number}", own) for number, own in enumerate(statements))


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
