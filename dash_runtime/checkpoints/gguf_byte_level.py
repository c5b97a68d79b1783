"""The parts of a byte-level BPE tokenizer, from a GGUF file's vocabulary, merges and pre-tokenizer name.

A GGUF file holds only the pre-tokenizer's name. The patterns below come from the models' own tokenizer.json files, and
equal llama.cpp's for the same names (src/llama-vocab.cpp). Knows no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.tokenizer_parts import TokenizerParts
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.wording import one_line, quoted

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _WORDS_AND_SPACES
_QWEN2_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _WORDS_AND_SPACES

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS_BY_CASE = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SPACES_WITH_SLASHES = _WORDS_AND_SPACES.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN_PATTERN = "|".join((*_WORDS_BY_CASE, r"\p{N}")) + _SPACES_WITH_SLASHES
_GPT4O_PATTERN = "|".join((*(f"{own}{_CONTRACTIONS}?" for own in _WORDS_BY_CASE), r"\p{N}{1,3}")) + _SPACES_WITH_SLASHES


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """The steps that cut a text before BPE, and the settings that the pre-tokenizer's name implies."""

    steps: list[Any]
    normalizer: Any = None
    ignores_merges: bool = False
    adds_bos_by_default: bool = False


def _split_by(pattern: str) -> list[Any]:
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), by_bytes]


_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = _PreTokenizer(_split_by(_LLAMA3_PATTERN), ignores_merges=True, adds_bos_by_default=True)
_SMOLLM = _PreTokenizer([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL])
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer([_BYTE_LEVEL]),
    "smollm": _SMOLLM,
    "refact": _SMOLLM,  # Granite
    "dbrx": _PreTokenizer(_split_by(_LLAMA3_PATTERN)),  # OLMo 2
    "gpt-4o": _PreTokenizer(_split_by(_GPT4O_PATTERN)),  # Phi-4-mini
    "tekken": _PreTokenizer(_split_by(_TEKKEN_PATTERN), ignores_merges=True, adds_bos_by_default=True),  # Ministral 3
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _PreTokenizer(_split_by(_QWEN2_PATTERN), normalizer=normalizers.NFC()),
}


def byte_level_parts(gguf: GgufFile, vocab: Mapping[str, int]) -> TokenizerParts:
    """Returns the parts of a tokenizer of kind "gpt2".

    Args:
        vocab: ids by token, without unused ones.

    Raises:
        UnsupportedArchitecture: the pre-tokenizer is not supported.
        CorruptCheckpoint: the merges do not fit the vocabulary.
    """
    name = gguf.get("tokenizer.ggml.pre", str)
    if name not in PRE_TOKENIZERS:
        raise UnsupportedArchitecture(
            f"{gguf.path} has the pre-tokenizer {quoted(name)}, and only "
            f"{', '.join(PRE_TOKENIZERS)} are converted; use the model's Hugging Face folder."
        )
    pre_tokenizer = PRE_TOKENIZERS[name]
    merges = [_split_merge(merge) for merge in gguf.require_list("tokenizer.ggml.merges", str)]
    try:
        model = models.BPE(dict(vocab), merges, ignore_merges=pre_tokenizer.ignores_merges)
    except Exception as error:
        # The tokenizers package raises bare Exceptions.
        reason = one_line(error)
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its merges do not fit its tokens ({reason}).") from None
    return TokenizerParts(
        model,
        pre_tokenizer.normalizer,
        pre_tokenizers.Sequence(pre_tokenizer.steps),
        decoders.ByteLevel(),
        [processors.ByteLevel(trim_offsets=False)],
        pre_tokenizer.adds_bos_by_default,
    )


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right
