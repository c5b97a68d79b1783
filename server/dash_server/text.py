"""Between text and token ids: encoding, incremental decoding, and stop strings.

Knows nothing of requests, networks or the worker. Uses the `tokenizers` library on the model folder's
tokenizer.json, never transformers (whose tokenizers import torch).
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from dash_runtime.checkpoints import load_tokenizer

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes and a token at least one, so an incomplete character at the
# end lies within the last three tokens; a replacement character before those is there to stay.
_MAX_HELD_TOKENS = 3
_MAX_WINDOW_TOKENS = 12


class TextTokenizer:
    """The model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids: frozenset[int] = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """The tokenizer in `folder`.

        Raises:
            CheckpointNotFound: there is no tokenizer.json.
            CorruptCheckpoint: it cannot be read.
        """
        return cls(load_tokenizer(folder / "tokenizer.json"))

    def is_text(self, token_id: int) -> bool:
        """Whether the token can be part of a text: a special one, or one beyond the vocabulary, cannot."""
        return token_id not in self.special_token_ids and self._tokenizer.id_to_token(token_id) is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none added; the text of a special token becomes that token."""
        # Unlike `encode`, this one releases the interpreter lock.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, without special ones."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class Detokenizer:
    """Text of a growing list of tokens, at a cost per token that does not grow with it.

    A token's text can depend on those before it (a leading space that the first token loses, a
    character whose bytes are spread over several tokens), so a short window is decoded again for every
    token and what is new in it is given out. The concatenation is the text of all tokens decoded at
    once, wherever that text is valid UTF-8.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._is_text = tokenizer.is_text
        self._decode = tokenizer.decode
        self._window: list[int] = []
        """The tokens that last completed some text, for context, and those after them."""
        self._num_given_tokens = 0
        self._num_given_chars = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before. Ends in no incomplete character."""
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
        """What was held back, once no token can follow."""
        rest = self._decode(self._window)[self._num_given_chars :]
        self._num_given_chars += len(rest)
        return rest

    def _shorten_window(self, num_dropped_tokens: int, num_held_chars: int) -> None:
        # Counted from the end: without what stood before it, the front of the window may read otherwise.
        del self._window[:num_dropped_tokens]
        self._num_given_chars = len(self._decode(self._window)) - num_held_chars


class StopStrings:
    """Finds the stop string that is completed first, however the text is cut into pieces.

    Of several completed by the same character, the longest counts.
    """

    def __init__(self, stop_strings: Iterable[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._prefixes = {stop[:length] for stop in self._stop_strings for length in range(1, len(stop))}
        self._max_held_chars = max(map(len, self._prefixes), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that no stop string can take back any more; nothing after a match."""
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
        """What was held back, once no text can follow."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text, and how many of the pushed tokens belong to the output (fewer after a stop string)."""

    text: str
    num_tokens: int


class OutputText:
    """The text of one output: detokenised, without stop tokens, cut at a stop string."""

    def __init__(self, tokenizer: TextTokenizer, stop_strings: Iterable[str], stop_token_ids: Set[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(stop_strings)
        self._stop_token_ids = stop_token_ids

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met."""
        return self._stop_strings.matched

    def push(self, token_ids: Sequence[int]) -> TextPiece:
        """The text that these tokens complete; the tokens after a stop string don't count."""
        pieces = []
        for position, token_id in enumerate(token_ids):
            if token_id not in self._stop_token_ids:
                pieces.append(self._stop_strings.push(self._detokenizer.push(token_id)))
            if self.stop_string is not None:
                return TextPiece("".join(pieces), position + 1)
        return TextPiece("".join(pieces), len(token_ids))

    def finish(self) -> str:
        """What was held back, once no token can follow; itself cut at a stop string."""
        return self._stop_strings.push(self._detokenizer.flush()) + self._stop_strings.flush()
