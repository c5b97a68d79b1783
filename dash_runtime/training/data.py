"""Text for calibration and training: what comes with Python, or the user's own files, as token ids.

Knows a tokenizer file; knows no decoder.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from dash_runtime.errors import ConfigError

_TEXT_KEYS = ("text", "content", "question", "answer", "prompt", "completion")


def default_token_sequences(tokenizer_file: Path, num_sequences: int, sequence_length: int) -> list[list[int]]:
    """Sequences of token ids from the texts of Python's own help, in a fixed order; fewer where a
    tokenizer makes less of them."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Six characters make at least one token in any vocabulary worth calibrating.
    return _sequences([text[: 6 * num_sequences * sequence_length]], tokenizer_file, sequence_length)[:num_sequences]


def file_token_sequences(path: Path, tokenizer_file: Path, sequence_length: int) -> list[list[int]]:
    """Sequences from a `.txt` or `.jsonl` file, or from all of them below a folder. Of a record, the text
    fields are joined.

    Raises:
        ConfigError: the data is missing, unreadable, or shorter than one sequence.
    """
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
    try:
        texts = [text for file in files for text in _texts(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("data", f"{path} cannot be read: {error}") from None
    sequences = _sequences(texts, tokenizer_file, sequence_length)
    if not sequences:
        raise ConfigError("data", f"{path} has less text than one sequence of {sequence_length} tokens")
    return sequences


def _texts(file: Path) -> Iterator[str]:
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise ConfigError("data", f"{file}, line {number} is not JSON") from None
        if not isinstance(record, dict):
            raise ConfigError("data", f"{file}, line {number} is not an object")
        yield "\n".join(str(record[key]) for key in _TEXT_KEYS if key in record) + "\n"


def _sequences(texts: list[str], tokenizer_file: Path, length: int) -> list[list[int]]:
    encodings = Tokenizer.from_file(str(tokenizer_file)).encode_batch_fast(texts, add_special_tokens=False)
    ids = [token_id for encoding in encodings for token_id in encoding.ids]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
