"""Builds tokenizer.json from a GGUF file's vocabulary, merges and pre-tokenizer name.

Byte-level BPE only. A GGUF file holds only the pre-tokenizer's name. The patterns below come from the models' own
tokenizer.json files, and equal llama.cpp's for the same names (src/llama-vocab.cpp). Knows no weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.checkpoints.gguf_file import GgufFile
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


def write_tokenizer(gguf: GgufFile, vocab_size: int, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, if the file has a template, chat_template.jinja.

    Raises:
        UnsupportedArchitecture: the kind of tokenizer or the pre-tokenizer is not supported.
        CorruptCheckpoint: the vocabulary contradicts itself, or the chat template is not valid.
    """
    template = gguf.get("tokenizer.chat_template", str)
    try:
        ChatTemplate(template, {})
    except ValueError as error:
        raise CorruptCheckpoint(f"{gguf.path}: its chat template cannot be used: {error}") from None
    pre_tokenizer = _pre_tokenizer(gguf)
    tokens = _tokens(gguf, vocab_size)
    tokenizer = _build(gguf, tokens, pre_tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {name: _special_token(gguf, key, tokens) for key, name in names.items()}
    config: dict[str, object] = {name: token for name, token in special.items() if token is not None}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.require(f"{gguf.require('general.architecture', str)}.context_length", int),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode())


def _pre_tokenizer(gguf: GgufFile) -> _PreTokenizer:
    model = gguf.require("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise UnsupportedArchitecture(
            f"{gguf.path} has a {quoted(model)} tokenizer, and only byte-level BPE ('gpt2') is converted; "
            "use the model's Hugging Face folder."
        )
    name = gguf.get("tokenizer.ggml.pre", str)
    if name not in PRE_TOKENIZERS:
        raise UnsupportedArchitecture(
            f"{gguf.path} has the pre-tokenizer {quoted(name)}, and only "
            f"{', '.join(PRE_TOKENIZERS)} are converted; use the model's Hugging Face folder."
        )
    return PRE_TOKENIZERS[name]


def _tokens(gguf: GgufFile, vocab_size: int) -> list[str]:
    tokens = gguf.require_list("tokenizer.ggml.tokens", str)
    if len(tokens) != vocab_size or len(set(tokens)) != vocab_size:
        raise CorruptCheckpoint(
            f"{gguf.path} is damaged: it lists {len(set(tokens))} different tokens, not {vocab_size}."
        )
    return tokens


def _build(gguf: GgufFile, tokens: list[str], pre_tokenizer: _PreTokenizer) -> Tokenizer:
    types = gguf.require_list("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise CorruptCheckpoint(f"{gguf.path} is damaged: it has {len(types)} types for {len(tokens)} tokens.")
    if not set(types) <= set(TokenType):
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its tokens have types that there are not.")
    typed = list(zip(tokens, types, strict=True))
    # Special tokens are in the BPE vocabulary too. Otherwise they would get other ids when the file is loaded.
    vocab = {token: i for i, (token, kind) in enumerate(typed) if kind != TokenType.UNUSED}
    merges = [_split_merge(merge) for merge in gguf.require_list("tokenizer.ggml.merges", str)]
    try:
        model = models.BPE(vocab, merges, ignore_merges=pre_tokenizer.ignores_merges)
    except Exception as error:
        # The tokenizers package raises bare Exceptions.
        reason = one_line(error)
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its merges do not fit its tokens ({reason}).") from None
    tokenizer = Tokenizer(model)
    if pre_tokenizer.normalizer is not None:
        tokenizer.normalizer = pre_tokenizer.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer.steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in typed if kind in (TokenType.CONTROL, TokenType.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, kind in typed if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.post_processor = _post_processor(gguf, tokens, pre_tokenizer)
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _post_processor(gguf: GgufFile, tokens: list[str], pre_tokenizer: _PreTokenizer) -> Any:
    """Returns the step that puts begin and end tokens around a text if the file asks for them."""
    adds_bos = gguf.get("tokenizer.ggml.add_bos_token", bool)
    if adds_bos is None:
        adds_bos = pre_tokenizer.adds_bos_by_default
    bos = _special_token(gguf, "bos", tokens) if adds_bos else None
    eos = _special_token(gguf, "eos", tokens) if gguf.get("tokenizer.ggml.add_eos_token", bool) else None
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos is None and eos is None:
        return byte_level
    single = [piece for piece in (bos, "$A", eos) if piece is not None]
    pair = [piece for piece in (bos, "$A", eos, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1") if piece]
    special = [(token, tokens.index(token)) for token in {bos, eos} if token is not None]
    return processors.Sequence(
        [byte_level, processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)]
    )


def _special_token(gguf: GgufFile, key: str, tokens: list[str]) -> str | None:
    token_id = gguf.get(f"tokenizer.ggml.{key}_token_id", int)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its {key} token {token_id} is outside its vocabulary.")
    return tokens[token_id]
