"""Detokenisation and stop strings: the pieces add up to the whole, wherever they are cut."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint
from dash_server.text import Detokenizer, OutputText, StopStrings, TextTokenizer
from tests.server.server_harness import toy_tokenizer

TEXTS = [
    "plain words, and more of them",
    "Grüße aus Köln — naïve café",
    "日本語のテキスト と 中文",
    "👩‍👩‍👧‍👦 family 🇩🇪 flags 🤷🏽‍♂️",
    "हिन्दी में लिखा हुआ",
    "\n\n  leading and trailing  \t",
    "e\u0301 combining, \u200b zero width",
]


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return TextTokenizer(toy_tokenizer())


def byte_pair_tokenizer(seed: int) -> TextTokenizer:
    """A byte-level tokenizer with random merges that ignore character boundaries."""
    chance = random.Random(seed)
    plain = toy_tokenizer()
    vocab = dict(plain.get_vocab(with_added_tokens=False))
    names = {id_: token for token, id_ in vocab.items()}
    merges = []
    encoded = [text.encode() for text in TEXTS]
    for _ in range(150):
        piece = chance.choice(encoded)
        start = chance.randrange(len(piece) - 2)
        left, right = names[piece[start]], names[piece[start + 1]]
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = plain.pre_tokenizer
    tokenizer.decoder = plain.decoder
    return TextTokenizer(tokenizer)


def sentencepiece_tokenizer() -> TextTokenizer:
    """A tokenizer like Llama 2's: words with a leading ▁, and bytes for unknown text."""
    words = ["▁plain", "▁words", ",", "▁and", "▁more", "▁", "of", "▁them", "a", "s"]
    vocab = {token: id_ for id_, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(tokenizer)


def stream(tokenizer: TextTokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_deltas_add_up_to_the_text_without_a_broken_character(text: str, seed: int | None) -> None:
    tokenizer = TextTokenizer(toy_tokenizer()) if seed is None else byte_pair_tokenizer(seed)
    deltas = stream(tokenizer, tokenizer.encode(text))
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("seed", range(20))
def test_arbitrary_valid_sequences_stream_as_they_decode(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice(chance.choice(TEXTS)) for _ in range(200))
    tokenizer = byte_pair_tokenizer(seed)
    token_ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids) == text


@pytest.mark.parametrize("seed", range(20))
def test_arbitrary_bytes_stream_as_they_decode(tokenizer: TextTokenizer, seed: int) -> None:
    chance = random.Random(seed)
    token_ids = [chance.choice([chance.randrange(256), *"é日x".encode()]) for _ in range(300)]
    deltas = stream(tokenizer, token_ids)
    valid = bytes(token_ids).decode(errors="ignore")
    assert "".join(deltas).replace("\ufffd", "") == valid


@pytest.mark.parametrize("seed", range(10))
def test_sentencepiece_sequences_stream_as_they_decode(seed: int) -> None:
    chance = random.Random(seed)
    tokenizer = sentencepiece_tokenizer()
    token_ids: list[int] = []
    for _ in range(60):
        token_ids += chance.choice([list("日é🤷".encode()), [chance.randrange(256, 270)], list(b"xy")])
    deltas = stream(tokenizer, token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids)


def test_a_character_is_held_until_its_last_byte(tokenizer: TextTokenizer) -> None:
    assert stream(tokenizer, list("a🤷b".encode())) == ["a", "", "", "", "🤷", "b", ""]


def test_invalid_bytes_do_not_stall_for_ever(tokenizer: TextTokenizer) -> None:
    deltas = stream(tokenizer, [0xFF] * 100)
    assert "".join(deltas) == "\ufffd" * 100
    assert len("".join(deltas[:50])) >= 46


def test_text_after_invalid_bytes_is_right(tokenizer: TextTokenizer) -> None:
    token_ids = [*b"a", 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xE6, 0x97, 0xA5, *b"b"]
    assert "".join(stream(tokenizer, token_ids)) == "a" + "\ufffd" * 5 + "日b"


class CountingTokenizer(TextTokenizer):
    """Counts the tokens that it decodes at once."""

    longest = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(token_ids))
        return super().decode(token_ids)


def test_work_per_token_does_not_grow() -> None:
    tokenizer = CountingTokenizer(toy_tokenizer())
    stream(tokenizer, [*"日本 text ".encode() * 50, *[0xFF] * 200])
    assert tokenizer.longest <= 12


def test_special_tokens_are_not_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.special_token_ids == {256, 257, 258}
    assert "".join(stream(tokenizer, [256, *b"a", 257, *b"b"])) == "ab"


def test_special_tokens_inside_a_character_do_not_break_it(tokenizer: TextTokenizer) -> None:
    assert "".join(stream(tokenizer, [0xC3, 257, 0xA9])) == "é"


def pieces_of(text: str, chance: random.Random) -> list[str]:
    cuts = sorted(chance.sample(range(len(text) + 1), k=min(4, len(text))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def cut(stop_strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stop_strings)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.flush(), matcher.matched


@pytest.mark.parametrize("seed", range(200))
def test_stop_strings_match_alike_for_every_split(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice("abc") for _ in range(12))
    stop_strings = ["".join(chance.choice("abc") for _ in range(chance.randint(1, 5))) for _ in range(3)]
    ends = [text.index(stop) + len(stop) for stop in stop_strings if stop in text]
    by_character = cut(stop_strings, list(text))
    assert cut(stop_strings, [text]) == by_character
    assert cut(stop_strings, pieces_of(text, chance)) == by_character
    kept, matched = by_character
    if matched is None:
        assert (kept, ends) == (text, [])
    else:
        assert kept + matched == text[: min(ends)]


def test_no_character_of_a_stop_string_is_given_out() -> None:
    matcher = StopStrings(["STOP"])
    assert [matcher.push(piece) for piece in ("a S", "TO", "X ST", "OP", "more")] == ["a ", "", "STOX ", "", ""]
    assert matcher.matched == "STOP"
    assert matcher.flush() == ""


def test_of_two_completed_together_the_longer_counts() -> None:
    assert cut(["cd", "bcd"], ["abcd"]) == ("a", "bcd")


def test_output_counts_the_tokens_up_to_the_stop_string(tokenizer: TextTokenizer) -> None:
    output = OutputText(tokenizer, ["bc"], frozenset())
    piece = output.push(list(b"abcdef"))
    assert (piece.text, piece.num_tokens, output.stop_string) == ("a", 3, "bc")
    assert output.finish() == ""


def test_a_stop_string_can_be_completed_by_the_flush(tokenizer: TextTokenizer) -> None:
    output = OutputText(tokenizer, ["x\ufffd"], frozenset())
    assert output.push([*b"wx", 0xE6]).text == "w"
    assert (output.finish(), output.stop_string) == ("", "x\ufffd")


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer.load(tmp_path).encode("abcdef") == list(b"abcdef")


def test_a_damaged_or_missing_tokenizer_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
