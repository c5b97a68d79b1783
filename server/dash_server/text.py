"""Encodes text to token ids, decodes them incrementally, and finds stop strings.

Knows no requests, no network and no worker. Reads tokenizer.json in the model folder with the `tokenizers` library,
never with transformers, whose tokenizers import torch.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from dash_runtime.checkpoints import load_tokenizer

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes and a token at least one. So an incomplete character lies within the last
# three tokens, and a replacement character before those is final.
_MAX_HELD_TOKENS = 3
_MAX_WINDOW_TOKENS = 12


class TextTokenizer:
    """The model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added_token_ids: dict[str, int] = {token.content: token_id for token_id, token in added.items()}
        """By their text: tokens that no merge of others makes."""
        self.special_token_ids: frozenset[int] = frozenset(
            token_id for token_id, token in added.items() if token.special
        )

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Reads the tokenizer in `folder`.

        Raises:
            CheckpointNotFound: there is no tokenizer.json.
            CorruptCheckpoint: tokenizer.json cannot be read.
        """
        return cls(load_tokenizer(folder / "tokenizer.json"))

    def is_text(self, token_id: int) -> bool:
        """True if the token can be part of a text. Special tokens and ids beyond the vocabulary cannot."""
        return token_id not in self.special_token_ids and self._tokenizer.id_to_token(token_id) is not None

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, with none added. The text of a special token becomes that token."""
        # Unlike `encode`, this one releases the interpreter lock.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the tokens' text, without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class Detokenizer:
    """Decodes a growing list of tokens at a constant cost per token.

    A token's text can depend on the tokens before it: the first token loses its leading space, and a character's bytes
    may be spread over several tokens. So each token decodes a short window again and gives out the new text. The pieces
    add up to the text of all tokens decoded at once, if that text is valid UTF-8.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._is_text = tokenizer.is_text
        self._decode = tokenizer.decode
        self._window: list[int] = []
        """The tokens that last completed some text, for context, and all tokens after them."""
        self._num_given_tokens = 0
        self._num_given_chars = 0

    def push(self, token_id: int) -> str:
        """Returns the text that this token makes certain. Holds back an incomplete character."""
        if not self._is_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_certain = len(text.rstrip(_REPLACEMENT))
        num_tokens_held = len(self._window) - self._num_given_tokens
        if num_certain < len(text) and num_tokens_held > _MAX_HELD_TOKENS:
            num_certain = max(num_certain, len(self._decode(self._window[:-_MAX_HELD_TOKENS])))
        new = text[self._num_given_chars : num_certain]
        self._num_given_chars += len(new)
        num_held_chars = max(0, len(text) - self._num_given_chars)
        if new and not num_held_chars:
            self._shorten_window(self._num_given_tokens, num_held_chars)
            self._num_given_tokens = len(self._window)
        elif len(self._window) >= _MAX_WINDOW_TOKENS:
            self._shorten_window(len(self._window) // 2, num_held_chars)
            self._num_given_tokens = 0
        return new

    def flush(self) -> str:
        """Returns the text held back, at the end of the output."""
        rest = self._decode(self._window)[self._num_given_chars :]
        self._num_given_chars += len(rest)
        return rest

    def _shorten_window(self, num_dropped_tokens: int, num_held_chars: int) -> None:
        # Count from the end: the front of the window may decode to another text without the dropped tokens.
        del self._window[:num_dropped_tokens]
        self._num_given_chars = len(self._decode(self._window)) - num_held_chars


class StopStrings:
    """Finds the stop string that is completed first, in text that comes in pieces.

    If one character completes several, the longest counts.
    """

    def __init__(self, stop_strings: Iterable[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._prefixes = {stop[:length] for stop in self._stop_strings for length in range(1, len(stop))}
        self._max_held_chars = max(map(len, self._prefixes), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Returns the text that cannot be part of a stop string any more; "" after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop_strings if stop in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        num_held = next(
            (n for n in range(min(self._max_held_chars, len(text)), 0, -1) if text[-n:] in self._prefixes), 0
        )
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Returns the text held back, at the end of the output."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text, and the number of pushed tokens that belong to the output (fewer after a stop string)."""

    text: str
    num_tokens: int


class OutputText:
    """Makes the text of one output: decodes it, leaves out stop tokens and cuts it at a stop string."""

    def __init__(self, tokenizer: TextTokenizer, stop_strings: Iterable[str], stop_token_ids: Set[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(stop_strings)
        self._stop_token_ids = stop_token_ids

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._stop_strings.matched

    def push(self, token_ids: Sequence[int]) -> TextPiece:
        """Returns the text that these tokens complete. Tokens after a stop string do not count."""
        pieces = []
        for position, token_id in enumerate(token_ids):
            if token_id not in self._stop_token_ids:
                pieces.append(self._stop_strings.push(self._detokenizer.push(token_id)))
            if self.stop_string is not None:
                return TextPiece("".join(pieces), position + 1)
        return TextPiece("".join(pieces), len(token_ids))

    def finish(self) -> str:
        """Returns the text held back, at the end of the output. Cuts it at a stop string too."""
        return self._stop_strings.push(self._detokenizer.flush()) + self._stop_strings.flush()
