"""Damages the headers of safetensors and GGUF files, and the facts of a policy file, as corruptions.py does.

Knows where the fields of the two containers lie; knows no loader.
"""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.soak.corruptions import (
    ANY_FILE,
    HUGE_NUMBERS,
    Corruption,
    damage_json,
    flip_bit_between,
    json_text,
)

_LENGTH_BYTES = 8
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U16", "BOOL", "F8_E4M3", "C64", "F99", "")
_SAFETENSORS_FLOATS = {"F32": ("<f", 4), "BF16": ("<H", 2)}
_METADATA = "__metadata__"


def flip_header_bit(path: Path, rng: random.Random) -> str:
    """Flips a bit in the header of a safetensors file."""
    (length,) = struct.unpack("<Q", path.read_bytes()[:_LENGTH_BYTES])
    return flip_bit_between(path, rng, 0, _LENGTH_BYTES + length)


def wrong_header_length(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:_LENGTH_BYTES])
    wrong = rng.choice((*HUGE_NUMBERS, 0, 1, 2, length - 1, length + 1, length + 8, len(data), len(data) - 8, 10**8))
    path.write_bytes(struct.pack("<Q", wrong) + data[_LENGTH_BYTES:])
    return f"header length {wrong} instead of {length}"


def wrong_tensor_entry(path: Path, rng: random.Random) -> str:
    """Damages one field of one tensor's entry in a safetensors header."""
    header, data = _split(path)
    names = [name for name in header if name != _METADATA]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    start, stop = entry["data_offsets"]
    shape = entry["shape"]
    huge = rng.choice(HUGE_NUMBERS)
    changes: Sequence[tuple[str, Any]] = (
        ("data_offsets", [start + 1, stop + 1]),
        ("data_offsets", [start, stop - 1]),
        ("data_offsets", [stop, start]),
        ("data_offsets", [-start - 1, stop]),
        ("data_offsets", [start, huge]),
        ("data_offsets", [huge, huge]),
        ("data_offsets", header[other]["data_offsets"]),
        ("data_offsets", []),
        ("shape", shape[::-1]),
        ("shape", [*shape, 1]),
        ("shape", [1, *shape]),
        ("shape", [math.prod(shape)]),
        ("shape", []),
        ("shape", [huge, huge]),
        ("shape", [0]),
        ("shape", [-1]),
        ("shape", [*shape[:-1], shape[-1] + 1]),
        ("dtype", rng.choice(_DTYPES)),
        ("dtype", rng.choice(_DTYPES)),
    )
    field, wrong = rng.choice(changes)
    entry[field] = wrong
    _join(path, header, data)
    return f"{field} of {name} is {wrong}"


def wrong_set_of_tensors(path: Path, rng: random.Random) -> str:
    """Renames, removes, doubles or adds a tensor of a safetensors file."""
    header, data = _split(path)
    name = rng.choice([name for name in header if name != _METADATA])
    start, stop = header[name]["data_offsets"]
    damage = rng.choice(("renamed", "left out", "left out with its data", "twice", "one too many"))
    text = None
    if damage == "renamed":
        header[f"{name}_"] = header.pop(name)
    elif damage == "twice":
        again = json_text({name: header[name] | {"shape": [1]}})
        text = json_text(header)[:-1] + "," + again[1:]
    elif damage == "one too many":
        header["extra"] = {"dtype": "U8", "shape": [8], "data_offsets": [len(data), len(data) + 8]}
        data += bytes(8)
    else:
        del header[name]
        if damage == "left out with its data":
            data = data[:start] + data[stop:]
            for key, entry in header.items():
                if key != _METADATA and entry["data_offsets"][0] >= stop:
                    entry["data_offsets"] = [offset - (stop - start) for offset in entry["data_offsets"]]
    _join(path, header, data, text)
    return f"{name} {damage}"


def wrong_safetensors_header(path: Path, rng: random.Random) -> str:
    """Damages anything in the header's JSON."""
    header, data = _split(path)
    header, what = damage_json(header, rng)
    _join(path, header, data)
    return f"header: {what}"


def not_finite(path: Path, rng: random.Random) -> str:
    """Replaces one number of a safetensors file by NaN or infinity."""
    header, data = _split(path)
    floats = [entry for name, entry in header.items() if name != _METADATA and entry["dtype"] in _SAFETENSORS_FLOATS]
    entry = rng.choice(floats)
    code, size = _SAFETENSORS_FLOATS[entry["dtype"]]
    value = rng.choice((float("nan"), float("inf"), float("-inf")))
    raw = struct.pack("<f", value) if code == "<f" else struct.pack("<f", value)[2:]
    place = entry["data_offsets"][0] + size * rng.randrange(math.prod(entry["shape"]))
    _join(path, header, data[:place] + raw + data[place + size :])
    return f"{value} in the data"


SAFETENSORS: Sequence[Corruption] = (
    *ANY_FILE,
    *(wrong_header_length, wrong_tensor_entry, wrong_set_of_tensors, wrong_safetensors_header) * 4,
    *(flip_header_bit, flip_header_bit, flip_header_bit, not_finite),
)


def wrong_facts(path: Path, rng: random.Random) -> str:
    """Damages anything in a policy file's JSON metadata."""
    header, data = _split(path)
    facts, what = damage_json(json.loads(header[_METADATA]["dash_policy"]), rng)
    header[_METADATA]["dash_policy"] = json_text(facts)
    _join(path, header, data)
    return f"facts: {what}"


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns the header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:_LENGTH_BYTES])
    stop = _LENGTH_BYTES + length
    return json.loads(raw[_LENGTH_BYTES:stop]), raw[stop:]


def _join(path: Path, header: Any, data: bytes, text: str | None = None) -> None:
    encoded = (json_text(header) if text is None else text).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


Field = tuple[str, int, int]
"""A field's meaning, offset and size in bytes."""

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_fields(data: bytes) -> Iterator[Field]:
    """Returns every field of a valid GGUF file's header, in order."""

    def number(offset: int, size: int) -> int:
        return int.from_bytes(data[offset : offset + size], "little")

    def text(name: str, offset: int) -> Iterator[Field]:
        yield f"length of {name}", offset, 8
        yield name, offset + 8, number(offset, 8)

    yield from (("magic", 0, 4), ("version", 4, 4), ("number of tensors", 8, 8), ("number of values", 16, 8))
    offset = 24
    for _ in range(number(16, 8)):
        yield from text("key", offset)
        offset += 8 + number(offset, 8)
        kind = number(offset, 4)
        yield "type", offset, 4
        offset, count = offset + 4, 1
        if kind == 9:
            kind, count = number(offset, 4), number(offset + 4, 8)
            yield from (("type of items", offset, 4), ("number of items", offset + 4, 8))
            offset += 12
        for _ in range(count):
            if kind == 8:
                yield from text("text", offset)
                offset += 8 + number(offset, 8)
            else:
                yield "number", offset, _SCALAR_BYTES[kind]
                offset += _SCALAR_BYTES[kind]
    for _ in range(number(8, 8)):
        yield from text("tensor name", offset)
        offset += 8 + number(offset, 8)
        yield "number of dimensions", offset, 4
        dimensions = number(offset, 4)
        offset += 4
        for _ in range(dimensions):
            yield "dimension", offset, 8
            offset += 8
        yield from (("tensor type", offset, 4), ("tensor offset", offset + 4, 8))
        offset += 12


def wrong_gguf_field(path: Path, rng: random.Random) -> str:
    """Replaces a number or a text of the header by another of the same size."""
    data = bytearray(path.read_bytes())
    by_name: dict[str, list[Field]] = {}
    for field in gguf_fields(bytes(data)):
        if field[2]:
            by_name.setdefault(field[0], []).append(field)
    name, start, size = rng.choice(by_name[rng.choice(sorted(by_name))])
    old = bytes(data[start : start + size])
    new = _other_text(rng, old, by_name[name], data) if size > 8 or name in _TEXTS else _other_number(rng, old)
    data[start : start + size] = new
    path.write_bytes(data)
    return f"{name} at {start}: {old[:20]!a} is {new[:20]!a}"


_TEXTS = ("key", "text", "tensor name", "magic")


def _other_number(rng: random.Random, old: bytes) -> bytes:
    value, bits = int.from_bytes(old, "little"), 8 * len(old)
    nearby = (value + 1, value - 1, value * 2, value ^ (1 << rng.randrange(bits)), rng.getrandbits(bits), 0, 1, 2)
    wrong = rng.choice((rng.choice(HUGE_NUMBERS), rng.choice(nearby))) % (1 << bits)
    if len(old) == 4 and rng.random() < 0.2:
        return struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30)))
    return wrong.to_bytes(len(old), "little")


def _other_text(rng: random.Random, old: bytes, alike: Sequence[Field], data: bytearray) -> bytes:
    """Returns noise, bad UTF-8, or the text of another field of the same length."""
    fitting = [bytes(data[start : start + size]) for _, start, size in alike if size == len(old)]
    return rng.choice((rng.randbytes(len(old)), b"\xff" * len(old), rng.choice(fitting), old.swapcase()))


def flip_gguf_header_bit(path: Path, rng: random.Random) -> str:
    *_, (_, start, size) = gguf_fields(path.read_bytes())
    return flip_bit_between(path, rng, 0, start + size)


def gguf_corruptions(wrong_metadata: Callable[[Path, random.Random], str]) -> Sequence[Corruption]:
    """The damages to a GGUF file. `wrong_metadata` writes the whole file anew with one wrong value."""
    return (*ANY_FILE, *(wrong_gguf_field,) * 16, *(flip_gguf_header_bit,) * 4, *(wrong_metadata,) * 8)
