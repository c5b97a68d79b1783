"""Compares where the native code has the fields of its structures with where structs.py has them."""

import ctypes
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dash_runtime.native import structs


class LayoutDiffers(ValueError):
    """The native code has other structures: to pass it ours would corrupt memory."""


class _Parts(NamedTuple):
    size: int
    places: Mapping[str, int]
    """A field's place, or a constant's value."""


def check_layout(text: str) -> None:
    """Compares the library's own text (layout.h) with the structures and constants here.

    Raises:
        LayoutDiffers: they differ; the message names the first structure and field that do.
    """
    theirs = dict(_parsed(text))
    for name, own in _own_layout():
        other = theirs.pop(name, None)
        if other is None:
            raise LayoutDiffers(f"native code has no {name}")
        for field in {**own.places, **other.places}:
            here, there = own.places.get(field), other.places.get(field)
            if here != there:
                raise LayoutDiffers(f"{name}.{field} is {here} in structs.py and {there} in native code")
        if own.size != other.size:
            raise LayoutDiffers(f"{name} has {own.size} bytes in structs.py and {other.size} in native code")
    for name in theirs:
        raise LayoutDiffers(f"structs.py has no {name}")


def _own_layout() -> Iterator[tuple[str, _Parts]]:
    for name, own in vars(structs).items():
        if isinstance(own, type) and issubclass(own, ctypes.Structure) and own is not ctypes.Structure:
            places = {field: getattr(own, field).offset for field, *_ in own._fields_}
            yield name.removesuffix("Struct"), _Parts(ctypes.sizeof(own), places)
    yield "constants", _Parts(0, {name: own for name, own in vars(structs).items() if isinstance(own, int)})


def _parsed(text: str) -> Iterator[tuple[str, _Parts]]:
    for line in text.splitlines():
        name, size, *parts = line.split(" ")
        yield name, _Parts(int(size), dict(zip(parts[::2], map(int, parts[1::2]), strict=True)))
