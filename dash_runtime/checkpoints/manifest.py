"""Reads and writes the manifest of a converted folder. It is written last, and tells a complete folder from a damaged
one.

It records the folder's source and the size and digest of each file. Digests of large files are left out, so that
opening a folder stays cheap. Knows no models.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import msgspec

from dash_runtime.checkpoints.gguf_weights import GgufWeights
from dash_runtime.checkpoints.weights import GGUF_PLACE_FILE, open_safetensors
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint
from dash_runtime.files.atomic_file import require_regular_file
from dash_runtime.files.checked_once import fault_of
from dash_runtime.files.json_file import read_json_object
from dash_runtime.files.wording import one_line

MANIFEST_FILE = "dash_manifest.json"
DIGEST_LIMIT_BYTES = 512 * 2**20
"""Larger files are compared by size and header: hashing would take about a second per gigabyte at every start."""

_OWN_DIGEST = "sha256"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The size of one file, and its SHA-256 if the file is small enough to hash at every start."""

    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a converted folder. `source` identifies the file that it was made from."""

    name: str
    source: str
    files: dict[str, FileRecord]


def write_manifest(folder: Path, name: str, source: str) -> None:
    """Writes a manifest of the files that are in `folder` now."""
    files = {file.name: FileRecord(file.stat().st_size, _digest(file)) for file in sorted(folder.iterdir())}
    facts = asdict(Manifest(name, source, files))
    text = json.dumps(facts | {_OWN_DIGEST: _digest_of(facts)}, indent=1)
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest of `folder`, or None if it is no converted folder.

    Raises:
        CorruptCheckpoint: the manifest itself is damaged.
    """
    file = folder / MANIFEST_FILE
    if not os.path.lexists(file):
        return None
    raw = read_json_object(file)
    try:
        # Older manifests have no digest of themselves.
        if _OWN_DIGEST in raw and raw.pop(_OWN_DIGEST) != _digest_of(raw):
            raise ValueError
        return msgspec.convert(raw, Manifest)
    except (ValueError, RecursionError):
        raise CorruptCheckpoint(f"{file} is damaged; delete the folder {folder}.") from None


def find_damage(folder: Path, manifest: Manifest) -> str | None:
    """Returns how the first damaged file differs from the manifest, or None if there is none."""
    for name, record in manifest.files.items():
        file = folder / name
        try:
            require_regular_file(file)
        except (OSError, ValueError):
            return f"{folder / one_line(name)} is missing, or no file"
        size_bytes = file.stat().st_size
        if size_bytes != record.size_bytes:
            return f"{file} has {size_bytes} bytes instead of {record.size_bytes}"
        if record.sha256 is not None and fault_of(file, partial(_change_of, file, record.sha256), record.sha256):
            return f"{file} has changed since it was written"
        if file.suffix == ".safetensors":
            try:
                open_safetensors(file, "np")
            except CorruptCheckpoint as error:
                return str(error).rstrip(".")
        if name == GGUF_PLACE_FILE:
            try:
                GgufWeights(folder)
            except (CheckpointNotFound, CorruptCheckpoint) as error:
                return str(error).rstrip(".")
    return None


def sha256_of(file: Path) -> str:
    """Returns the file's SHA-256 in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _change_of(file: Path, sha256: str) -> str | None:
    return None if sha256_of(file) == sha256 else "its contents"


def _digest(file: Path) -> str | None:
    return sha256_of(file) if file.stat().st_size <= DIGEST_LIMIT_BYTES else None


def _digest_of(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
