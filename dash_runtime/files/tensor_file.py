"""Reads and writes the project's own safetensors files: atomically, with a checksum, and with errors that name the
file.

The checksum covers everything else in the file and is stored in its metadata. Older files have none and are read as
they are. Knows files; knows nothing of what is in them.
"""

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dash_runtime.errors import PolicyFileError
from dash_runtime.files.atomic_file import replacing, require_regular_file
from dash_runtime.files.wording import one_line, quoted

CHECKSUM = "sha256"
"""The key of the checksum in the metadata, in hexadecimal."""

_MAX_CHARS = 400


def save_tensors(path: Path, what: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file in one rename, so that a reader never sees half of it.

    Raises:
        PolicyFileError: it cannot be written, naming `what` it is; the old file is intact.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with_checksum = {**metadata, CHECKSUM: checksum(contiguous, metadata)}
    try:
        with replacing(path) as partial:
            save_file(contiguous, partial, metadata=with_checksum)
    except (OSError, SafetensorError) as error:
        raise PolicyFileError(f"{what} {path} cannot be written ({error}); what was there before is intact") from None


def load_tensors(path: Path, what: str, keys: Collection[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the file's tensors, on the CPU, and its metadata without the checksum.

    Args:
        path: the file.
        what: the file's kind, for errors.
        keys: the metadata that it may have. Anything else is refused: a flipped bit in the checksum's key would
            otherwise make a file without a checksum.

    Raises:
        PolicyFileError: it is missing, cannot be read or has changed since it was written, naming `what` it is.
    """
    try:
        require_regular_file(path)
        with safe_open(path, framework="pt", device="cpu") as file, naming(path, what):
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PolicyFileError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise PolicyFileError(f"{what} {path} cannot be read: {error.strerror or one_line(error)}") from None
    except SafetensorError as error:
        raise PolicyFileError(f"{what} {path} cannot be read: {one_line(error)}") from None
    expected = metadata.pop(CHECKSUM, None)
    unknown = metadata.keys() - set(keys)
    if unknown:
        raise PolicyFileError(f"{what} {path} has the unknown metadata {quoted(min(unknown))}")
    if expected is not None and expected != checksum(tensors, metadata):
        raise PolicyFileError(f"{what} {path} has changed since it was written: its checksum is another")
    return tensors, metadata


def has_metadata(path: Path, key: str) -> bool:
    """Returns True if the file has this metadata; False too if it cannot be read, which `load_tensors` will say."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return key in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


@contextlib.contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Adds the file's name to any error that its contents lead to within the context.

    Raises:
        PolicyFileError: instead of an error that says that something is missing or of another type or shape.
    """
    try:
        yield
    except PolicyFileError as error:
        raise PolicyFileError(f"{what} {path}: {one_line(error, _MAX_CHARS)}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PolicyFileError(f"{what} {path} is damaged: {type(error).__name__} {one_line(error)}") from None


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns the SHA-256 of the metadata and of every tensor's name, dtype, shape and bytes, in any order.

    The tensors must be contiguous and on the CPU.
    """
    names = sorted(tensors)
    described = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), described]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
