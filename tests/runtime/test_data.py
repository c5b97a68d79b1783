"""From files to sequences of token ids: every text counts, conversations look as in serving, files are mixed."""

import json
from pathlib import Path

import pytest

from dash_runtime.checkpoints import resolve_checkpoint
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.errors import ConfigError
from dash_runtime.startup.default_text import default_token_sequences, encode
from dash_runtime.training.data import file_token_sequences, interleave, load_tokenizer
from tests.runtime.gguf_files import load_tokenizer as plain_tokenizer
from tests.tiny_models import byte_tokenizer, save_byte_tokenizer

USER, ASSISTANT, SYSTEM = 257, 258, 259


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Path:
    return model_folder / "tokenizer.json"


def write_records(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def one_sequence(path: Path, model_folder: Path, length: int, with_template: bool = True) -> list[int]:
    template = ChatTemplate.load(model_folder) if with_template else None
    (sequence,) = file_token_sequences(path, model_folder / "tokenizer.json", length, template)
    return sequence


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "id": 7},
        {"question": "hi", "answer": "yes", "text": "not this"},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": "hi", "response": "yes"},
    ],
)
def test_conversations_and_pairs_are_rendered_with_their_special_tokens(
    model_folder: Path, tmp_path: Path, record: dict[str, object]
) -> None:
    path = write_records(tmp_path / "chat.jsonl", record)
    assert one_sequence(path, model_folder, 9) == [USER, *b"hi\n", ASSISTANT, *b"yes\n"]
    assert one_sequence(path, model_folder, 7, with_template=False) == list(b"hi\nyes\n")


def test_a_model_without_a_template_gets_the_contents_only(model_folder: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "chat.jsonl", {"messages": [{"role": "system", "content": "a"}] * 3})
    (sequence,) = file_token_sequences(path, model_folder / "tokenizer.json", 6, ChatTemplate(None, {}))
    assert bytes(sequence) == b"a\na\na\n"


@pytest.mark.parametrize("key", ["text", "content"])
def test_plain_records_are_text_and_never_rendered(model_folder: Path, tmp_path: Path, key: str) -> None:
    path = write_records(tmp_path / "plain.jsonl", {key: "one"}, {key: ""}, {key: "two\n"})
    assert bytes(one_sequence(path, model_folder, 8)) == b"one\ntwo\n"


def test_a_sequence_begins_where_a_conversation_begins_and_they_follow_one_another(
    model_folder: Path, tmp_path: Path
) -> None:
    pair = {"question": "12345678", "answer": "12345678"}
    path = write_records(tmp_path / "chat.jsonl", *[pair] * 6)
    sequences = file_token_sequences(path, model_folder / "tokenizer.json", 40, ChatTemplate.load(model_folder))
    assert [ids[0] for ids in sequences] == [USER] * 3
    assert [ids.count(USER) for ids in sequences] == [2] * 3


def test_texts_shorter_than_a_sequence_are_kept_wherever_they_are(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short a")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.TXT").write_text("-" * 130)
    (tmp_path / "ignored.md").write_text("no such text")
    write_records(tmp_path / "c.jsonl", {"text": "short c"})
    text = b"|".join(bytes(ids) for ids in file_token_sequences(tmp_path, tokenizer, 50))
    assert b"short a\n---" in text
    assert b"---\nshort c\n" in text
    assert text.count(b"|") == 2
    assert b"no such text" not in text


def test_files_are_mixed_alike_in_any_number_of_sequences_and_every_time(tokenizer: Path, tmp_path: Path) -> None:
    sizes = {"a": 400, "b": 200, "c": 100}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text(name * (10 * size - 1))
    sequences = file_token_sequences(tmp_path, tokenizer, 10)
    assert sequences == file_token_sequences(tmp_path, tokenizer, 10)
    names = [chr(ids[0]) for ids in sequences]
    for number in range(1, len(names) + 1):
        for name, size in sizes.items():
            assert abs(names[:number].count(name) - number * size / 700) < 3


def test_interleaving_keeps_all_and_spreads_groups_of_one() -> None:
    groups = [[[number]] for number in range(50)] + [[[1000 + number] for number in range(50)]]
    mixed = interleave(groups)
    assert sorted(mixed) == sorted(ids for group in groups for ids in group)
    assert 5 < sum(ids[0] >= 1000 for ids in mixed[:20]) < 15
    assert interleave(groups, seed=1) != mixed
    large = [ids[0] for ids in mixed if ids[0] >= 1000]
    assert large != sorted(large), "the order within a group is drawn too"
    assert interleave([[], [[1]]]) == [[1]]


def test_line_ends_inside_json_strings_are_text(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b\u0085c"}\r\n\r\n{"text": "d"}'.encode())
    text = "a\u2028b\u0085c\nd\n".encode()
    (sequence,) = file_token_sequences(path, tokenizer, len(text))
    assert bytes(sequence) == text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.txt", None, "No such file"),
        ("short.txt", b"too short", "less text than one sequence of 64 tokens"),
        ("empty.txt", b"", "less text"),
        ("binary.txt", b"\xff\xfe\x00" * 50, "cannot be read: it is not UTF-8"),
        ("binary.jsonl", b'{"text": "\xff"}', "cannot be read: it is not UTF-8"),
        ("data.csv", b"a,b\n" * 100, "must be a .txt or .jsonl file"),
        ("broken.jsonl", b'{"text": "fine"}\n{broken\n', "line 2 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("list.jsonl", b"\n[1, 2]\n", "line 2 is not an object"),
        ("unknown.jsonl", b'{"body": "x"}', "line 1 has no known text field; known are messages"),
        ("half.jsonl", b'{"question": "x"}', "no known text field"),
        ("number.jsonl", b'{"text": 3}', "line 1: `text` must be text"),
        ("null.jsonl", b'{"question": "x", "answer": null}', "line 1: `answer` must be text"),
        ("no-list.jsonl", b'{"messages": "x"}', "`messages` must be a list"),
        ("no-messages.jsonl", b'{"messages": []}', "`messages` must be a list"),
        ("no-message.jsonl", b'{"messages": ["x"]}', "line 1, message 1 is not an object"),
        ("no-role.jsonl", b'{"messages": [{"content": "x"}]}', "message 1: `role` must be text"),
        ("empty-role.jsonl", b'{"messages": [{"role": "", "content": "x"}]}', "message 1: `role` must not be empty"),
        ("parts.jsonl", b'{"messages": [{"role": "user", "content": []}]}', "message 1: `content` must be text"),
        ("refused.jsonl", b'{"messages": [{"role": "wizard", "content": "x"}]}', "line 1: .* refuses it: no wizard"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}', "line 1 has half of a surrogate pair"),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_file_and_line(
    tokenizer: Path, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    template = ChatTemplate("{% if messages[0].role == 'wizard' %}{{ raise_exception('no wizard') }}{% endif %}", {})
    with pytest.raises(ConfigError, match=words) as refusal:
        file_token_sequences(path, tokenizer, 64, template)
    assert refusal.value.field == "data"
    assert name in refusal.value.description


def test_a_folder_without_texts_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \.txt or \.jsonl files"):
        file_token_sequences(tmp_path, tokenizer, 64)


def test_a_tokenizer_that_truncates_and_pads_does_neither_here(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("<|end|>")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=256, pad_token="<|end|>", length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path / "tokenizer.json"), ["a", "12345678"]) == [[*b"a"], [*b"12345678"]]


def test_pythons_help_gives_the_same_sequences_in_order(tokenizer: Path) -> None:
    few, more = (default_token_sequences(tokenizer, number, 32) for number in (3, 6))
    assert more[:3] == few
    assert {len(ids) for ids in more} == {32}
    assert b"assert" in bytes(token for ids in few for token in ids)


@pytest.mark.embedded
def test_a_rendered_record_has_the_embedded_models_special_tokens(embedded_cache: Path, tmp_path: Path) -> None:
    folder = resolve_checkpoint("embedded", None, embedded_cache)
    path = write_records(tmp_path / "chat.jsonl", {"question": "What is 2 + 2?", "answer": "4"})
    template = ChatTemplate.load(folder)
    rendered = template.render_conversation([("user", "What is 2 + 2?"), ("assistant", "4")])
    expected = plain_tokenizer(folder).encode(rendered, add_special_tokens=False).ids
    (sequence,) = file_token_sequences(path, folder / "tokenizer.json", len(expected), template)
    assert sequence == expected
    assert (sequence[0], sequence.count(1), sequence.count(2)) == (1, 3, 3)
