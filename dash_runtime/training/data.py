"""Default text for calibration: what comes with Python. Knows a tokenizer file; knows no decoder."""

from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer


def default_token_sequences(tokenizer_file: Path, num_sequences: int, sequence_length: int) -> list[list[int]]:
    """Sequences of token ids from the texts of Python's own help, in a fixed order; fewer where a
    tokenizer makes less of them."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Six characters make at least one token in any vocabulary worth calibrating.
    ids = tokenizer.encode(text[: 6 * num_sequences * sequence_length], add_special_tokens=False).ids
    chunks = [ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length)]
    return [chunk for chunk in chunks if len(chunk) == sequence_length][:num_sequences]
