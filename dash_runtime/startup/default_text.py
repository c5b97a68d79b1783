"""The text that every installation has, Python's own help, as sequences of token ids.

Knows a tokenizer file; knows no decoder.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from dash_runtime.checkpoints import load_tokenizer


def default_token_sequences(tokenizer_file: Path, num_sequences: int, sequence_length: int) -> list[list[int]]:
    """Sequences of token ids from the texts of Python's own help, in a fixed order; fewer where a
    tokenizer makes less of them.

    Raises:
        CorruptCheckpoint: the tokenizer file cannot be used.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Six characters make at least one token in any vocabulary worth calibrating.
    (ids,) = encode(load_tokenizer(tokenizer_file), [text[: 6 * num_sequences * sequence_length]])
    return cut(ids, sequence_length)[:num_sequences]


def cut(ids: Sequence[int], length: int) -> list[list[int]]:
    """Sequences of `length` token ids, one after another; what is left at the end is dropped."""
    return [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, none added: a chat template writes its special tokens itself, and their text becomes
    those tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
