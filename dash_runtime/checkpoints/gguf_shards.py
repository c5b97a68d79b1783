"""The files of a GGUF model that was split: `NAME-00001-of-00003.gguf` and so on. Knows names; knows no contents."""

import re
from pathlib import Path
from typing import NamedTuple

_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_MOST_SHARDS = 1000


class GgufModel(NamedTuple):
    """A model's name, without ending and number, and its files in order."""

    name: str
    paths: list[Path]


def gguf_model(path: Path) -> GgufModel:
    """Returns the model that the file belongs to. The files need not exist."""
    match = _SHARD.fullmatch(path.stem)
    count = 0 if match is None else int(match["count"])
    if match is None or not 1 <= int(match["number"]) <= count <= _MOST_SHARDS:
        return GgufModel(path.stem, [path])
    names = (f"{match['name']}-{number:05d}-of-{count:05d}{path.suffix}" for number in range(1, count + 1))
    return GgufModel(match["name"], [path.with_name(name) for name in names])
