"""Builds tokenizer.json from a GGUF file's vocabulary. Knows no weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, processors

from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.checkpoints.gguf_byte_level import byte_level_parts
from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.gguf_sentencepiece import sentencepiece_parts
from dash_runtime.checkpoints.tokenizer_parts import TokenizerParts
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.wording import quoted

_MakeParts = Callable[[GgufFile, Mapping[str, int]], TokenizerParts]
_KINDS: dict[str, _MakeParts] = {"gpt2": byte_level_parts, "llama": sentencepiece_parts}
"""By the name in the file."""


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
    kind = gguf.require("tokenizer.ggml.model", str)
    if kind not in _KINDS:
        raise UnsupportedArchitecture(
            f"{gguf.path} has a {quoted(kind)} tokenizer, and only {' and '.join(map(repr, _KINDS))} are converted; "
            "use the model's Hugging Face folder."
        )
    tokens = _tokens(gguf, vocab_size)
    tokenizer = _build(gguf, tokens, _KINDS[kind])
    # Its own `save` raises a plain Exception where there is no room.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
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


def _tokens(gguf: GgufFile, vocab_size: int) -> list[str]:
    tokens = gguf.require_list("tokenizer.ggml.tokens", str)
    if len(tokens) != vocab_size or len(set(tokens)) != vocab_size:
        raise CorruptCheckpoint(
            f"{gguf.path} is damaged: it lists {len(set(tokens))} different tokens, not {vocab_size}."
        )
    return tokens


def _build(gguf: GgufFile, tokens: list[str], make_parts: _MakeParts) -> Tokenizer:
    types = gguf.require_list("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise CorruptCheckpoint(f"{gguf.path} is damaged: it has {len(types)} types for {len(tokens)} tokens.")
    if not set(types) <= set(TokenType):
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its tokens have types that there are not.")
    typed = list(zip(tokens, types, strict=True))
    # Special tokens are in the model's vocabulary too. Otherwise they would get other ids when the file is loaded.
    vocab = {token: i for i, (token, kind) in enumerate(typed) if kind != TokenType.UNUSED}
    parts = make_parts(gguf, vocab)
    tokenizer = Tokenizer(parts.model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if (part := getattr(parts, name)) is not None:
            setattr(tokenizer, name, part)
    special = [token for token, kind in typed if kind in (TokenType.CONTROL, TokenType.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, kind in typed if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.post_processor = _post_processor(gguf, tokens, parts)
    return tokenizer


def _post_processor(gguf: GgufFile, tokens: list[str], parts: TokenizerParts) -> Any:
    """Returns the step that puts begin and end tokens around a text if the file asks for them."""
    adds_bos = gguf.get("tokenizer.ggml.add_bos_token", bool)
    if adds_bos is None:
        adds_bos = parts.adds_bos_by_default
    bos = _special_token(gguf, "bos", tokens) if adds_bos else None
    eos = _special_token(gguf, "eos", tokens) if gguf.get("tokenizer.ggml.add_eos_token", bool) else None
    if bos is None and eos is None:
        return processors.Sequence(list(parts.post_processors))
    single = [piece for piece in (bos, "$A", eos) if piece is not None]
    pair = [piece for piece in (bos, "$A", eos, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1") if piece]
    special = [(token, tokens.index(token)) for token in {bos, eos} if token is not None]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return processors.Sequence([*parts.post_processors, template])


def _special_token(gguf: GgufFile, key: str, tokens: list[str]) -> str | None:
    token_id = gguf.get(f"tokenizer.ggml.{key}_token_id", int)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its {key} token {token_id} is outside its vocabulary.")
    return tokens[token_id]
