"""Damages any file, and any JSON file: each function rewrites the file at a path and says in a few words what it did.

All chance comes from the given generator, so that a damage can be repeated. Knows bytes and JSON; knows no loader and
no format of ours.
"""

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Corruption = Callable[[Path, random.Random], str]

HUGE_NUMBERS = (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
SPARSE_BYTES = 2**30

_DEEP = "@deep@"
_LONG = "@long@"
_TWICE = "@twice@"
_DEPTH = 100_000
_DIGITS = 5_000

WRONG_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, -0.5, 1e308, 1e-300, 10**40, -(2**63), *HUGE_NUMBERS),
    *("", "text", "0", "two\nlines", "\ud800", "\x00", "name" * 2_000),
    *([], {}, [[1]], [None], ["text"], [1, 2], {"a": {"b": 1}}),
    *(float("nan"), float("inf"), float("-inf"), _DEEP, _LONG),
)
EXTRA_KEYS: tuple[tuple[str, Any], ...] = (
    *(
        ("num_labels", 2**31),
        ("id2label", {"0": 1}),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": 1}),
    ),
    *(("rope_scaling", {"rope_type": "yarn"}), ("rope_scaling", [1]), ("layer_types", [1, 2]), ("head_dim", 7)),
    *(("sliding_window", -1), ("__class__", 1), ("to_dict", 2), ("attribute_map", 3), ("partial_rotary_factor", 0.5)),
)


def cut_short(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    size = rng.choice((rng.randrange(len(data)), rng.randrange(min(64, len(data))), len(data) - 1))
    path.write_bytes(data[:size])
    return f"cut to {size} of {len(data)} bytes"


def empty(path: Path, rng: random.Random) -> str:
    del rng
    path.write_bytes(b"")
    return "empty"


def flip_one_bit(path: Path, rng: random.Random) -> str:
    return flip_bit_between(path, rng, 0, path.stat().st_size)


def flip_bit_between(path: Path, rng: random.Random, start: int, stop: int) -> str:
    """Flips one bit of one byte in `[start, stop)`."""
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(start, stop), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} flipped"


def flip_many_bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    places = sorted(rng.randrange(len(data)) for _ in range(rng.randint(2, 16)))
    for place in places:
        data[place] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return f"bytes {places} changed"


def overwrite_range(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    start, stop = _range(rng, len(data))
    kind = rng.choice(("zeros", "ones", "noise"))
    fill = {"zeros": bytes(stop - start), "ones": b"\xff" * (stop - start), "noise": rng.randbytes(stop - start)}
    data[start:stop] = fill[kind]
    path.write_bytes(data)
    return f"{kind} over bytes {start} to {stop}"


def move_range(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    start, stop = _range(rng, len(data))
    part = data[start:stop]
    kind = rng.choice(("removed", "doubled", "at the front", "at the end"))
    rest = data[:start] + data[stop:]
    results = {
        "removed": rest,
        "doubled": data[:stop] + part + data[stop:],
        "at the front": part + rest,
        "at the end": rest + part,
    }
    path.write_bytes(results[kind])
    return f"bytes {start} to {stop} {kind}"


def insert_noise(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    place, noise = rng.choice((0, len(data), rng.randrange(len(data)))), rng.randbytes(rng.randint(1, 64))
    path.write_bytes(data[:place] + noise + data[place:])
    return f"{len(noise)} bytes of noise inserted at {place}"


def insert_bad_text(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    bad = rng.choice((b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"\r", b"\x1b[31m"))
    place = rng.choice((0, rng.randrange(len(data))))
    path.write_bytes(data[:place] + bad + data[place:])
    return f"{bad!r} inserted at {place}"


def other_format(path: Path, rng: random.Random) -> str:
    others = (b"\x80\x04}\x94.", b"PK\x03\x04" + bytes(60), b"\x89PNG\r\n\x1a\n" + bytes(60), b"<html>404</html>")
    others += (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", rng.randbytes(1_000))
    number = rng.randrange(len(others))
    path.write_bytes(others[number])
    return f"another file ({others[number][:8]!r})"


def no_file(path: Path, rng: random.Random) -> str:
    """Replaces the file by a folder, a link, a pipe or nothing."""
    path.unlink()
    kind = rng.choice(("folder", "link to itself", "link to nothing", "missing", "pipe"))
    if kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "link to nothing":
        path.symlink_to("nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    return kind


def extend_sparsely(path: Path, rng: random.Random) -> str:
    """Fills the file with many zeros, as a file system may leave after a power cut. They take no room on the disk."""
    if rng.random() < 0.5:
        path.write_bytes(b"")
    os.truncate(path, SPARSE_BYTES)
    return f"{SPARSE_BYTES} bytes, most of them zeros"


ANY_FILE: Sequence[Corruption] = (
    *(
        cut_short,
        cut_short,
        flip_one_bit,
        flip_one_bit,
        flip_one_bit,
        flip_many_bytes,
        overwrite_range,
        overwrite_range,
    ),
    *(move_range, move_range, insert_noise, insert_bad_text, other_format, no_file, empty, extend_sparsely),
)


def write_json(path: Path, value: Any) -> None:
    """Writes `value`, with its placeholders replaced by text that Python's own JSON cannot write."""
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    text = json.dumps(value)
    text = text.replace(f'"{_DEEP}"', "[" * _DEPTH + "]" * _DEPTH).replace(f'"{_LONG}"', "9" * _DIGITS)
    return text.replace(_TWICE, "")


def damage_json(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Returns `value` with one thing wrong in it, and says what. Changes a container in place."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.04:
        wrong = rng.choice(WRONG_VALUES)
        return wrong, f"all of it is {_short(wrong)}"
    container, key, place = _somewhere(value, rng)
    wrong = rng.choice(WRONG_VALUES)
    damages = ["value", "value", "value", "deleted"]
    if isinstance(container, dict):
        damages += ["twice", "renamed", "extra"]
    damage = rng.choice(damages)
    if damage == "value":
        container[key] = wrong
        return value, f"{place} is {_short(wrong)}"
    if damage == "twice":
        container[f"{key}{_TWICE}"] = wrong
        return value, f"{place} is there twice, then as {_short(wrong)}"
    if damage == "extra":
        name, extra = rng.choice(EXTRA_KEYS)
        container[name] = extra
        return value, f"{name} beside {place} is {_short(extra)}"
    kept = container.pop(key)
    if damage == "renamed":
        container[f"{key}_"] = kept
    return value, f"{place} {damage}"


def damage_json_file(path: Path, rng: random.Random) -> str:
    value, what = damage_json(json.loads(path.read_text("utf-8")), rng)
    write_json(path, value)
    return what


ANY_JSON: Sequence[Corruption] = (*ANY_FILE, *(damage_json_file,) * (2 * len(ANY_FILE)))


def _somewhere(value: Any, rng: random.Random) -> tuple[Any, Any, str]:
    """Returns a container within `value`, one of its keys, and the path to it in words."""
    way: list[str] = []
    while True:
        key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        way.append(str(key)[:30])
        below = value[key]
        if not isinstance(below, (dict, list)) or not below or rng.random() < 0.3:
            return value, key, ascii("/".join(way))
        value = below


def _range(rng: random.Random, size: int) -> tuple[int, int]:
    start = rng.randrange(size)
    length = rng.choice((rng.randint(1, 16), rng.randint(1, max(1, size // 4))))
    return start, min(size, start + length)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:36]}…"
