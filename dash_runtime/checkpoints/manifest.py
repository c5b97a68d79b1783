"""The manifest of a converted folder: written last, it tells a complete folder from a damaged one.

It records where the folder came from and how large each file is, and the digest of the small ones, so that
opening a folder is cheap. Knows nothing of models.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dash_runtime.checkpoints.json_file import read_json_object
from dash_runtime.checkpoints.weights import check_safetensors
from dash_runtime.errors import CorruptCheckpoint

MANIFEST_FILE = "dash_manifest.json"
DIGEST_LIMIT_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file's size, and its SHA-256 where the file is small enough to hash on every start."""

    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted folder holds. `source` identifies the file it was made from."""

    name: str
    source: str
    files: dict[str, FileRecord]


def write_manifest(folder: Path, name: str, source: str) -> None:
    """Records every file that is in `folder` now."""
    files = {file.name: FileRecord(file.stat().st_size, _digest(file)) for file in sorted(folder.iterdir())}
    text = json.dumps(asdict(Manifest(name, source, files)), indent=1)
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, or None where it is no converted folder.

    Raises:
        CorruptCheckpoint: the manifest itself is damaged.
    """
    file = folder / MANIFEST_FILE
    if not file.exists():
        return None
    raw = read_json_object(file)
    try:
        files = {name: FileRecord(**record) for name, record in raw["files"].items()}
        return Manifest(str(raw["name"]), str(raw["source"]), files)
    except (KeyError, TypeError, AttributeError):
        raise CorruptCheckpoint(f"{file} is damaged; delete the folder {folder}.") from None


def find_damage(folder: Path, manifest: Manifest) -> str | None:
    """How the folder's files differ from the manifest, naming the first one, or None.

    Weights are compared by size and header only.
    """
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        size_bytes = file.stat().st_size
        if size_bytes != record.size_bytes:
            return f"{file} has {size_bytes} bytes instead of {record.size_bytes}"
        if record.sha256 is not None and _digest(file) != record.sha256:
            return f"{file} has changed since it was written"
        if file.suffix == ".safetensors":
            try:
                check_safetensors(file)
            except CorruptCheckpoint as error:
                return str(error).rstrip(".")
    return None


def sha256_of(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(file: Path) -> str | None:
    is_small = file.suffix != ".safetensors" and file.stat().st_size <= DIGEST_LIMIT_BYTES
    return sha256_of(file) if is_small else None
