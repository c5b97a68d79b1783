"""Draws of tokens from logits, as the native code is told of them."""

from collections.abc import Callable, Iterable, Mapping
from ctypes import Array
from typing import NamedTuple

from torch import Tensor

from dash_runtime.rows.structs import DrawStruct


class Draw(NamedTuple):
    """A token's draw: the temperature, what is kept of the likeliest tokens, and a number in [0, 1) that chooses."""

    temperature: float
    top_p: float
    min_p: float
    number: float
    top_k: int
    """0 for all."""


DrawTokens = Callable[[Tensor, Mapping[int, Draw]], list[int]]
"""Draws a token for each of some rows of float32 logits `[rows, vocab_size]`, which lie one behind the other."""


def draw_structs(draws: Iterable[Draw]) -> "Array[DrawStruct]":
    """Returns draws for the native code."""
    own = [DrawStruct(*draw) for draw in draws]
    return (DrawStruct * len(own))(*own)
