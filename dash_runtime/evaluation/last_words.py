"""Makes questions for the last word of a passage from the paragraphs of a text, after LAMBADA (Paperno et al. 2016).

Knows files and token ids; knows no models.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.likelihood import Encode, Passage, passage_of

_SENTENCE_END = re.compile(r"(?<=\s)([^\W\d_]{3,})[.!?](?=\s|$)")
"""A whole word of letters before a mark that ends a sentence."""
_MIN_WORDS = 20
"""Words of context before the last one."""
_MAX_TOKENS = 128
"""Limit of a passage; a longer one loses its beginning."""


def last_word_passages(path: Path, encode: Encode, num_prompt: int, count: int) -> list[Passage]:
    """Returns up to `count` passages, evenly spread over the paragraphs of a text, each with its last word to predict.

    A paragraph is a line. It is cut after its last sentence that ends in a word that it had before, as most of
    LAMBADA's do: such words can be known from the context. The first `num_prompt` tokens are the prompt, and the rest
    runs as if the model had written it.

    Raises:
        ConfigError: the file cannot be read, or no paragraph is long enough.
    """
    passages: list[Passage] = []
    for context, word in _cut_paragraphs(path):
        whole = passage_of(encode, context, f" {word}")
        surplus = max(0, min(len(whole.token_ids) - _MAX_TOKENS, whole.num_given - 1))
        num_given = whole.num_given - surplus
        if num_given > num_prompt:
            passages.append(Passage(whole.token_ids[surplus:], num_given, num_prompt))
    if not passages:
        needs = f"{_MIN_WORDS} words and {num_prompt} tokens"
        raise ConfigError(
            "last-words", f"{path} has no paragraph of {needs} before a sentence's last word that it had before"
        )
    count = min(count, len(passages))
    return [passages[place * len(passages) // count] for place in range(count)]


def _cut_paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError("last-words", f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError("last-words", f"{path} is not UTF-8 text") from None
    for line in text.split("\n"):
        paragraph = line.strip()
        for end in reversed(list(_SENTENCE_END.finditer(paragraph))):
            context, word = paragraph[: end.start()].rstrip(), end[1]
            words = re.findall(r"\w+", context.casefold())
            if len(words) < _MIN_WORDS:
                break
            if word.casefold() in words:
                yield context, word
                break
