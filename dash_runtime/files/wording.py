"""Makes the words of a library and the contents of a file short and printable, so that errors can quote them.

Imports nothing heavy; knows no errors.
"""

import reprlib

_MAX_QUOTED_CHARS = 80
_MAX_REASON_CHARS = 200

_QUOTES = reprlib.Repr()
_QUOTES.maxstring = _QUOTES.maxother = _QUOTES.maxlong = _MAX_QUOTED_CHARS
_QUOTES.maxlevel = 2


def quoted(value: object) -> str:
    """Returns the `repr` of a value from a file on one line, cut if it is long."""
    return one_line(_QUOTES.repr(value))


def one_line(reason: object, max_chars: int = _MAX_REASON_CHARS) -> str:
    """Returns a library's message on one line, cut if it is long: it may quote the whole file."""
    words = " ".join(str(reason).split())
    words = words if len(words) <= max_chars else f"{words[: max_chars - 1]}…"
    return "".join(character if character.isprintable() else "?" for character in words)
