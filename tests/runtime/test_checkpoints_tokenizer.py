"""The tokenizer of a converted folder gives the ids that the model was trained on."""

from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gguf import TokenType
from transformers import AutoTokenizer

from dash_runtime.checkpoints.gguf_byte_level import PRE_TOKENIZERS
from dash_runtime.checkpoints.gguf_conversion import convert_gguf
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
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
        tmp_path / "m.gguf", llama, metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
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


WORDS, DIGITS = "aNew HTTPServer doesn't WE'VE //\n", "1234: 5"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", WORDS, ["aNew", "ĠHTTPServer", "Ġdoesn", "'t", "ĠWE", "'VE", "Ġ//Ċ"]),
        ("gpt-4o", WORDS, ["a", "New", "ĠHTTPServer", "Ġdoesn't", "ĠWE'VE", "Ġ//Ċ"]),
        ("tekken", WORDS, ["a", "New", "ĠHTTPServer", "Ġdoesn", "'t", "ĠWE", "'VE", "Ġ//Ċ"]),
        *((pre, DIGITS, ["1", "2", "3", "4", ":", "Ġ", "5"]) for pre in ("smollm", "qwen2", "refact", "tekken")),
        *((pre, DIGITS, ["123", "4", ":", "Ġ", "5"]) for pre in ("llama-bpe", "dbrx", "gpt-4o")),
        ("gpt-2", DIGITS, ["1234", ":", "Ġ5"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_says(
    llama: Path, tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    tokenizer = load_tokenizer(converted(llama, tmp_path, pre=pre))
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


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


PIECES = {
    "▁": -1.0, "a": -2.0, "b": -2.5, "n": -2.6, "▁a": -3.0, "an": -4.0, "ana": -5.0, "ban": -4.5, "na": -4.2,
    "bana": -6.0, "▁▁": -7.0, "▁ban": -6.5, "é": -8.0,
}  # fmt: skip
"""Pieces and their scores. Joins that begin alike end differently: "banana" may become ban-ana or bana-na."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCEPIECE_TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "  "]


def sentencepiece(tmp_path: Path, **changes: Any) -> Path:
    """Converts a file with these pieces. The two spaces at the end are a user-defined token."""
    size = len(SENTENCEPIECE_TOKENS)
    folder = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1, vocab_size=size)
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [*[TokenType.NORMAL] * len(PIECES), TokenType.USER_DEFINED]
    metadata = {
        "model": "llama",
        "tokens": SENTENCEPIECE_TOKENS,
        "token_type": [int(kind) for kind in types],
        "scores": [0.0] * 259 + list(PIECES.values()) + [-1000.0],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": False,
    }
    return converted(folder, tmp_path, **(metadata | changes))


def joined_by_score(text: str) -> list[str]:
    """SentencePiece's rule in a few lines: of all neighbours that make a piece, the best are joined, leftmost first."""
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-PIECES[a + b], place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in PIECES]
        if not pairs:
            return [piece for part in parts for piece in ([part] if part in PIECES else byte_pieces(part))]
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def byte_pieces(character: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in character.encode()]


def test_sentencepieces_neighbours_are_joined_by_their_scores(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path))
    rng = Random(1)
    texts = ["banana", " banana bandana", "naïve 日本 é", "".join(rng.choices("abn é", k=200)).replace("  ", " ")]
    for text in texts:
        assert tokenizer.encode(text).tokens == ["<s>", *joined_by_score(text)]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_sentencepiece_files_own_tokens_are_cut_out_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path))
    assert tokenizer.encode("a  b</s>").tokens == ["<s>", "a", "  ", "b", "</s>"]
    assert tokenizer.decode(tokenizer.encode("a  b</s>").ids) == "a  b"


def test_a_space_before_the_text_is_added_and_taken_back_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path, add_space_prefix=True, add_bos_token=False))
    assert tokenizer.encode("ban a").tokens == ["▁ban", "▁a"]
    assert tokenizer.decode(tokenizer.encode("ban a").ids) == "ban a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "1 scores for"),
        ({"tokens": [t.replace("<0x41>", "<0x4g>") for t in SENTENCEPIECE_TOKENS]}, "lacks the byte <0x41>"),
        ({"model": "t5"}, "only 'gpt2' and 'llama' are converted"),
    ],
)
def test_a_sentencepiece_file_that_cannot_be_converted_says_why(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((CorruptCheckpoint, UnsupportedArchitecture), match=message):
        sentencepiece(tmp_path, **changes)
