"""Turns a text that every installation has, Python's own help, into sequences of token ids.

Knows a tokenizer file; knows no decoder.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from dash_runtime.checkpoints import load_tokenizer


def default_token_sequences(tokenizer_file: Path, num_sequences: int, sequence_length: int) -> list[list[int]]:
    """Returns sequences of token ids from Python's own help, in a fixed order; fewer if a tokenizer makes too few
    tokens of it.

    Raises:
        CorruptCheckpoint: the tokenizer file cannot be used.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Six characters make at least one token in any vocabulary worth calibrating.
    (ids,) = encode(load_tokenizer(tokenizer_file), [text[: 6 * num_sequences * sequence_length]])
    return cut(ids, sequence_length)[:num_sequences]


def cut(ids: Sequence[int], length: int) -> list[list[int]]:
    """Cuts `ids` into sequences of `length` token ids; drops the rest."""
    return [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Returns the token ids of each text, without added special tokens: a chat template writes them as text, which
    becomes those tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
