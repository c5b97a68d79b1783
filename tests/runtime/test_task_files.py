"""The user's task files: the records read, and a sentence with file and line for each fault."""

import json
from pathlib import Path

import pytest

from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.task_files import ChoiceQuestion, OpenQuestion, read_tasks

CHOICE = {"question": "What flies?", "choices": ["a stone", "a bird"], "answer": 1}
OPEN = {"question": "3 + 4?", "answer": "It is 7.\n#### 7"}


def write(folder: Path, *records: object) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_tasks(path)
    assert caught.value.field == "tasks"
    assert str(path) in caught.value.description
    return caught.value.description


def test_choice_records_are_read_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, CHOICE, CHOICE | {"answer": 0, "id": "ignored"})
    first = ChoiceQuestion("What flies?", ("a stone", "a bird"), 1)
    assert read_tasks(path) == [first, ChoiceQuestion("What flies?", ("a stone", "a bird"), 0)]


def test_open_records_are_read_past_empty_lines_a_mark_and_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    line = json.dumps(OPEN).encode()
    separator_in_text = json.dumps(OPEN | {"question": "a\u2028b"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + separator_in_text)
    assert read_tasks(path) == [OpenQuestion(**OPEN), OpenQuestion("a\u2028b", OPEN["answer"])]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (["not", "an", "object"], "is not an object"),
        ({"answer": "7"}, "has no question"),
        ({"question": "3 + 4?"}, "has no answer"),
        ({"question": 34, "answer": "7"}, "must have a text for question, not 34"),
        ({"question": "3 + 4?", "answer": 7}, "must have a text for answer, not 7"),
        ({"question": " ", "answer": "7"}, "has nothing in its question"),
        ({"question": "3 + 4?", "answer": ""}, "has nothing in its answer"),
        ({"question": "\ud800", "answer": "7"}, "lone surrogate"),
        (CHOICE | {"question": None}, "must have a text for question, not"),
        (CHOICE | {"choices": "ab"}, "has choices that are not a list"),
        (CHOICE | {"choices": []}, "needs at least two choices, has 0"),
        (CHOICE | {"choices": ["a bird"]}, "needs at least two choices, has 1"),
        (CHOICE | {"choices": ["a bird", 2]}, "must have a text for choice 1, not 2"),
        (CHOICE | {"choices": ["", "a bird"]}, "has nothing in its choice 0"),
        (CHOICE | {"answer": 2}, "has answer 2, but its choices are 0 to 1"),
        (CHOICE | {"answer": -1}, "has answer -1, but its choices are 0 to 1"),
        (CHOICE | {"answer": "1"}, "must be the right one's place"),
        (CHOICE | {"answer": True}, "must be the right one's place"),
        (CHOICE | {"answer": 1.0}, "must be the right one's place"),
        ({key: CHOICE[key] for key in ("question", "choices")}, "has no answer"),
    ],
)
def test_a_wrong_record_is_refused_with_its_line(record: object, complaint: str, tmp_path: Path) -> None:
    right = CHOICE if isinstance(record, dict) and "choices" in record else OPEN
    message = refusal(write(tmp_path, right, record))
    assert complaint in message
    assert "line 2" in message


def test_a_file_with_both_kinds_is_refused(tmp_path: Path) -> None:
    for records in ((CHOICE, OPEN), (OPEN, CHOICE)):
        assert "line 2 is of another kind" in refusal(write(tmp_path, *records))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no records"),
        (b"\n \n", "has no records"),
        (b'{"question": "a", "answer": "b"}\n{"question"', "line 2 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"question": "a", "answer": "b"}\n{"question": "\xff"}\n', "line 2 is not UTF-8"),
    ],
)
def test_a_file_of_something_else_is_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    assert complaint in refusal(path)


def test_a_missing_file_and_a_folder_without_any_are_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "missing.jsonl")
    (tmp_path / "questions.txt").write_text("no questions")
    assert "has no records" in refusal(tmp_path)
