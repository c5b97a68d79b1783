"""The tokenizer of a converted folder gives the ids that the model was trained on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dash_runtime.checkpoints.gguf_conversion import convert_gguf
from dash_runtime.checkpoints.gguf_tokenizer import PRE_TOKENIZERS
from tests.runtime.gguf_files import BOS_TOKEN_ID, CONTROL_TOKEN_IDS, load_tokenizer, tiny_tokens, write_gguf
from tests.tiny_models import save_tiny_model

TEXTS = [
    "abc ab a",
    "in 2024, 12345\r\n\r\n and  3.14\t",
    "<|user|>abc<|end|>\n<think>",
    "naïve 日本語 😀 e\u0301",
    "   \n  x I'll WE'VE",
    "",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", num_hidden_layers=1)


def converted(llama: Path, tmp_path: Path, **metadata: Any) -> Path:
    gguf = write_gguf(
        tmp_path / "m.gguf",
        llama,
        metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()},
    )
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(gguf, folder)
    return folder


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_survives_encoding_and_decoding(llama: Path, tmp_path: Path, pre: str) -> None:
    tokenizer = load_tokenizer(converted(llama, tmp_path, pre=pre, add_bos_token=False))
    for text in TEXTS:
        if pre == "qwen2":
            text = text.replace("e\u0301", "\u00e9")  # Qwen normalises to NFC
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_token_keeps_its_id(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(converted(llama, tmp_path))
    assert [tokenizer.token_to_id(token) for token in tiny_tokens()] == list(range(260))


def test_control_tokens_are_special_and_user_defined_ones_are_not(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(converted(llama, tmp_path))
    added = tokenizer.get_added_tokens_decoder()
    assert {token_id for token_id, token in added.items() if token.special} == set(CONTROL_TOKEN_IDS)
    encoded = tokenizer.encode("<|user|><think>abc<|end|>").tokens
    assert encoded == ["<|user|>", "<think>", "abc", "<|end|>"]
    ids = tokenizer.encode("<|user|><think>abc<|end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>abc"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["aNew", "ĠHTTPServer", "Ġdoesn", "'t", "ĠWE", "'VE", "Ġ//Ċ"]),
        ("gpt-4o", ["a", "New", "ĠHTTPServer", "Ġdoesn't", "ĠWE'VE", "Ġ//Ċ"]),
        ("tekken", ["a", "New", "ĠHTTPServer", "Ġdoesn", "'t", "ĠWE", "'VE", "Ġ//Ċ"]),
    ],
)
def test_words_are_cut_as_the_pre_tokenizer_says(llama: Path, tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = load_tokenizer(converted(llama, tmp_path, pre=pre))
    assert tokenizer.pre_tokenizer is not None
    text = "aNew HTTPServer doesn't WE'VE //\n"
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3", "4", ":", "Ġ", "5"]),
        ("gpt-2", ["1234", ":", "Ġ5"]),
        ("llama-bpe", ["123", "4", ":", "Ġ", "5"]),
        ("qwen2", ["1", "2", "3", "4", ":", "Ġ", "5"]),
        ("refact", ["1", "2", "3", "4", ":", "Ġ", "5"]),
        ("dbrx", ["123", "4", ":", "Ġ", "5"]),
        ("gpt-4o", ["123", "4", ":", "Ġ", "5"]),
        ("tekken", ["1", "2", "3", "4", ":", "Ġ", "5"]),
    ],
)
def test_digits_are_cut_as_the_pre_tokenizer_says(llama: Path, tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = load_tokenizer(converted(llama, tmp_path, pre=pre))
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("1234: 5")] == pieces


@pytest.mark.parametrize(
    ("metadata", "has_bos"),
    [
        ({"pre": "smollm"}, False),
        ({"pre": "smollm", "add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
    ],
)
def test_the_begin_token_is_added_where_the_file_asks_for_it(
    llama: Path, tmp_path: Path, metadata: dict[str, Any], has_bos: bool
) -> None:
    tokenizer = load_tokenizer(converted(llama, tmp_path, **metadata))
    assert tokenizer.encode("abc").ids == [BOS_TOKEN_ID] * has_bos + [tiny_tokens().index("abc")]


def test_transformers_reads_the_same_tokenizer_and_template(llama: Path, tmp_path: Path) -> None:
    folder = converted(llama, tmp_path)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert (theirs.bos_token, theirs.eos_token) == ("<|user|>", "<|end|>")
    rendered = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "hi!"


def test_unused_tokens_cannot_be_produced(llama: Path, tmp_path: Path) -> None:
    types = [1] * 256 + [3, 3, 3, 5]
    tokenizer = load_tokenizer(converted(llama, tmp_path, token_type=types))
    assert tokenizer.token_to_id("<think>") is None
