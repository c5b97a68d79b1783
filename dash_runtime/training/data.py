"""The user's own text for calibration and training, as sequences of token ids.

Knows files, a tokenizer file and a chat template; knows no decoder.
"""

import json
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dash_runtime.checkpoints import load_tokenizer
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.errors import ConfigError, InvalidRequest
from dash_runtime.startup.default_text import encode

_SUFFIXES = (".txt", ".jsonl")
_PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"))
_PLAIN = ("text", "content")
_KNOWN = "messages, question and answer, prompt and completion, prompt and response, text, content"

Message = tuple[str, str]
"""Role and content."""


def file_token_sequences(
    path: Path, tokenizer_file: Path, sequence_length: int, chat_template: ChatTemplate | None = None
) -> list[list[int]]:
    """Reads sequences of token ids from a `.txt` or `.jsonl` file, or from all of them below a folder.

    A record with `messages`, or with a question and its answer, becomes a conversation in the model's chat template,
    if it has one. Texts are packed one after another, so that short ones count too, and cut. The last sequence ends
    with the text, and may overlap the one before it. The order is always the same, and any number of sequences from
    the start has about the same share of each file as the whole.

    Raises:
        ConfigError: the data is missing, unreadable, holds no text, or is shorter than one sequence.
        CorruptCheckpoint: the tokenizer file cannot be used.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    ids: list[int] = []
    file_starts: list[int] = []
    for file in _files(path):
        file_starts.append(len(ids))
        for text_ids in encode(tokenizer, _texts(file, chat_template)):
            ids += text_ids
    if len(ids) < sequence_length:
        raise ConfigError("data", f"{path} has less text than one sequence of {sequence_length} tokens")
    starts = list(range(0, len(ids) - sequence_length + 1, sequence_length))
    if starts[-1] + sequence_length < len(ids):
        starts.append(len(ids) - sequence_length)
    by_file: list[list[list[int]]] = [[] for _ in file_starts]
    for start in starts:
        by_file[bisect_right(file_starts, start) - 1].append(ids[start : start + sequence_length])
    return interleave(by_file)


def interleave(groups: Sequence[Sequence[list[int]]], seed: int = 0) -> list[list[int]]:
    """Returns all sequences of all groups in an order that the seed determines.

    Any number of them from the start has about the same share of each group as the whole.
    """
    placed: list[tuple[float, int, list[int]]] = []
    for number, group in enumerate(groups):
        # Each group has its own generator, so that another file does not reorder the others.
        generator = random.Random(f"{seed}/{number}")
        # A random start: without it all small groups would meet in the middle.
        first = generator.random()
        shuffled = generator.sample(group, len(group))
        placed += [((place + first) / len(group), number, sequence) for place, sequence in enumerate(shuffled)]
    return [sequence for _, _, sequence in sorted(placed, key=lambda entry: entry[:2])]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.exists() and path.suffix.lower() not in _SUFFIXES:
            raise ConfigError("data", f"{path} must be a .txt or .jsonl file, or a folder of them")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    if not files:
        raise ConfigError("data", f"{path} has no .txt or .jsonl files")
    return files


def _texts(file: Path, chat_template: ChatTemplate | None) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError("data", f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError("data", f"{file} cannot be read: it is not UTF-8 text") from None
    if file.suffix.lower() != ".jsonl":
        yield _whole_lines(content)
        return
    # Not splitlines(): JSON strings may contain Unicode's other line ends.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _record_text(line, f"{file}, line {number}", chat_template)


def _record_text(line: str, place: str, chat_template: ChatTemplate | None) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError("data", f"{place} is not JSON") from None
    if not isinstance(record, dict):
        raise ConfigError("data", f"{place} is not an object")
    conversation = _conversation(record, place)
    if conversation is None:
        text = _whole_lines(_plain_text(record, place))
    elif chat_template is None or chat_template.source is None:
        text = _whole_lines("\n".join(content for _, content in conversation))
    else:
        try:
            text = chat_template.render_conversation(conversation)
        except InvalidRequest as error:
            raise ConfigError("data", f"{place}: {error.description}") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("data", f"{place} has half of a surrogate pair, which is no text") from None
    return text


def _conversation(record: Mapping[str, Any], place: str) -> list[Message] | None:
    """Returns the messages of a record; None if it is no conversation."""
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise ConfigError("data", f"{place}: `messages` must be a list of messages")
        return [_message(message, f"{place}, message {number}") for number, message in enumerate(messages, 1)]
    for question, answer in _PAIRS:
        if question in record and answer in record:
            return [("user", _text(record, question, place)), ("assistant", _text(record, answer, place))]
    return None


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise ConfigError("data", f"{place} is not an object")
    role = _text(message, "role", place)
    if not role:
        raise ConfigError("data", f"{place}: `role` must not be empty")
    return role, _text(message, "content", place)


def _plain_text(record: Mapping[str, Any], place: str) -> str:
    for key in _PLAIN:
        if key in record:
            return _text(record, key, place)
    raise ConfigError("data", f"{place} has no known text field; known are {_KNOWN}")


def _text(record: Mapping[str, Any], key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ConfigError("data", f"{place}: `{key}` must be text")
    return value


def _whole_lines(text: str) -> str:
    """Returns the text with a line end, so that the text packed after it begins on a line of its own."""
    return text if not text or text.endswith("\n") else f"{text}\n"
