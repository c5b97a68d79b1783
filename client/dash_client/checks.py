"""Checks each option's type and range. Knows no protobuf and no server.

Each function raises InvalidArgumentError, which names the argument, for a value that it does not return.
The server repeats these checks, and adds those that depend on its model and settings.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dash_client.errors import invalid_argument

_MAX_INT32 = 2**31 - 1


def require_known(options: Mapping[str, Any], kind: type[Any]) -> None:
    """Raises TypeError if an option is none of a typed dictionary's; it names those that there are."""
    known = kind.__annotations__.keys()
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"no such option: {', '.join(unknown)}; there are {', '.join(sorted(known))}")


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    is_low_open: bool = False
    is_integer: bool = False

    def __contains__(self, value: float) -> bool:
        # NaN is in no range.
        return (self.low < value if self.is_low_open else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        number = "an integer" if self.is_integer else "a number"
        if self.high == _MAX_INT32:
            return f"{number} of {self.low} or more"
        return f"{number} in {'(' if self.is_low_open else '['}{self.low}, {self.high}]"


_RANGES = {
    "temperature": _Range(0, 100),
    "top_k": _Range(0, _MAX_INT32, is_integer=True),
    "top_p": _Range(0, 1, is_low_open=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0.01, 100),
    "presence_penalty": _Range(-100, 100),
    "frequency_penalty": _Range(-100, 100),
    "logit_bias": _Range(-100, 100),
    "seed": _Range(0, 2**64 - 1, is_integer=True),
    "max_new_tokens": _Range(1, _MAX_INT32, is_integer=True),
    "n": _Range(1, _MAX_INT32, is_integer=True),
    "compute_budget": _Range(0, 1, is_low_open=True),
    "draft_length": _Range(1, _MAX_INT32, is_integer=True),
    "logprobs": _Range(0, 20, is_integer=True),
}
_FLAGS = frozenset({"ignore_eos", "return_decisions", "trace", "immediate"})


def option(name: str, value: Any) -> Any:
    """Returns the value to send; `name` is an option with a single value."""
    if name in _RANGES:
        return number(name, value)
    return flag(name, value) if name in _FLAGS else text(name, value)


def number(name: str, value: Any, argument: str | None = None) -> float:
    """Returns the number, checked against the range of the option `name`. Takes numpy integers, but not True.

    The error names `argument`, by default the option.
    """
    allowed = _RANGES[name]
    is_number = not isinstance(value, (bool, str, bytes))
    try:
        converted = (operator.index(value) if allowed.is_integer else float(value)) if is_number else math.nan
    except (TypeError, ValueError, OverflowError):
        converted = math.nan
    if converted not in allowed:
        raise invalid_argument(argument or name, f"must be {allowed}, not {_shown(value)}")
    return converted


def token_id(argument: str, value: Any) -> int:
    """Returns a token id, an integer of 0 or more; only the server can check it against the vocabulary."""
    try:
        converted = operator.index(value)
    except TypeError:
        converted = -1
    if isinstance(value, bool) or not 0 <= converted < 2**32:
        raise invalid_argument(argument, f"must hold token ids, integers of 0 or more, not {_shown(value)}")
    return converted


def flag(argument: str, value: Any) -> bool:
    """Returns a bool."""
    if not isinstance(value, bool):
        raise invalid_argument(argument, f"must be True or False, not {_shown(value)}")
    return value


def text(argument: str, value: Any) -> str:
    """Returns text that can be sent: a string without half a character (a lone surrogate)."""
    if not isinstance(value, str):
        raise invalid_argument(argument, f"must be text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid_argument(argument, f"has half a character at position {error.start}: {error.reason}") from None
    return value


def timeout(value: Any, default: float | None) -> float | None:
    """Returns the seconds for one call, more than 0, or None for no deadline.

    Infinity means no deadline, whatever the default.
    """
    chosen = default if value is None else value
    if chosen is None or chosen == math.inf:
        return None
    if isinstance(chosen, (bool, str, bytes)) or not hasattr(chosen, "__float__") or not float(chosen) > 0:
        raise invalid_argument("timeout", f"must be a number of seconds, more than 0, not {_shown(chosen)}")
    return float(chosen)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:36]}… ({type(value).__name__})"
