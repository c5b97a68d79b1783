"""The parts of a tokenizer that differ between its kinds. Knows the tokenizers package; knows no files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """The parts of a `tokenizers.Tokenizer`; None where it has no such part."""

    model: Any
    normalizer: Any
    pre_tokenizer: Any
    decoder: Any
    post_processors: Sequence[Any]
    """Those that run before begin and end tokens are added."""
    adds_bos_by_default: bool
