"""The files of a GGUF model that was split: `NAME-00001-of-00003.gguf` and so on. Knows names; knows no contents."""

import re
from pathlib import Path

_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_MOST_SHARDS = 1000


def shard_paths(path: Path) -> list[Path]:
    """Returns all files of the model that `path` belongs to, in order; `path` alone if it is no part of one."""
    match = _SHARD.fullmatch(path.stem)
    count = 0 if match is None else int(match["count"])
    if match is None or not 1 <= int(match["number"]) <= count <= _MOST_SHARDS:
        return [path]
    return [
        path.with_name(f"{match['name']}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1)
    ]


def model_name(path: Path) -> str:
    """Returns the file's name without its ending and without its number."""
    match = _SHARD.fullmatch(path.stem)
    return path.stem if match is None or len(shard_paths(path)) == 1 else match["name"]
