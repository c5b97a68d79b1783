"""The parts of a tokenizer whose vocabulary came from SentencePiece, from a GGUF file's tokens and scores.

It joins the neighbours whose piece has the highest score, again and again, and spells in bytes what is left
(SentencePiece's BPE; kind "llama" in llama.cpp, which Llama 2, Mistral and Gemma have). Knows no weights.
"""

from collections.abc import Mapping

from tokenizers import decoders, models, normalizers

from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.tokenizer_parts import TokenizerParts
from dash_runtime.errors import CorruptCheckpoint

_SPACE = "\u2581"
"""Stands for a space within a piece."""
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_parts(gguf: GgufFile, vocab: Mapping[str, int]) -> TokenizerParts:
    """Returns the parts of a tokenizer of kind "llama".

    Args:
        vocab: ids by token, without unused ones.

    Raises:
        CorruptCheckpoint: scores or byte tokens are missing.
    """
    scores = gguf.require_list("tokenizer.ggml.scores", float)
    if len(scores) <= max(vocab.values(), default=-1):
        raise CorruptCheckpoint(f"{gguf.path} is damaged: it has {len(scores)} scores for {len(vocab)} tokens.")
    missing = next((token for token in _BYTES if token not in vocab), None)
    if missing is not None:
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its tokenizer lacks the byte {missing}.")
    unknown = gguf.get("tokenizer.ggml.unknown_token_id", int)
    unknown_token = next((token for token, token_id in vocab.items() if token_id == unknown), None)
    merges = _merges(vocab, scores)
    model = models.BPE(dict(vocab), merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True)
    begins_with_space = gguf.get("tokenizer.ggml.add_space_prefix", bool) is not False
    escape = normalizers.Replace(" ", _SPACE)
    unescape = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not begins_with_space:
        return TokenizerParts(model, escape, None, decoders.Sequence(unescape), (), adds_bos_by_default=True)
    normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape])
    decoder = decoders.Sequence([*unescape, decoders.Strip(" ", 1, 0)])
    return TokenizerParts(model, normalizer, None, decoder, (), adds_bos_by_default=True)


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the pairs that make a piece, best first: by the piece's score, and of equal ones by the lower id."""
    merges = [
        (-scores[token_id], token_id, token[:cut], token[cut:])
        for token, token_id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]
