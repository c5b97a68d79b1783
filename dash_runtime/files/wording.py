"""What an error's sentence may quote: the words of a library and the contents of a file, made short and printable.

Imports nothing heavy; knows no errors.
"""

import reprlib

_MAX_QUOTED_CHARS = 80
_MAX_REASON_CHARS = 200

_QUOTES = reprlib.Repr()
_QUOTES.maxstring = _QUOTES.maxother = _QUOTES.maxlong = _MAX_QUOTED_CHARS
_QUOTES.maxlevel = 2


def quoted(value: object) -> str:
    """`repr` of a value from a file, on one line and cut where it is long."""
    return one_line(_QUOTES.repr(value))


def one_line(reason: object, max_chars: int = _MAX_REASON_CHARS) -> str:
    """What a library says of a file, on one line and cut where it is long: it may quote all of the file."""
    words = " ".join(str(reason).split())
    words = words if len(words) <= max_chars else f"{words[: max_chars - 1]}…"
    return "".join(character if character.isprintable() else "?" for character in words)
