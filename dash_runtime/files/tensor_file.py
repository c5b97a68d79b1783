"""Reading and writing safetensors files of one's own: whole or not at all, with a checksum, and with errors that name
the file.

The checksum is metadata beside the caller's own, over everything else in the file. Files from before there was one have
none, and are read as they are. Knows files; knows nothing of what is in them.
"""

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

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
        PolicyFileError: it cannot be written, naming `what` it is; what was there before is intact.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with_checksum = {**metadata, CHECKSUM: checksum(contiguous, metadata)}
    try:
        with replacing(path) as partial:
            save_file(contiguous, partial, metadata=with_checksum)
    except (OSError, SafetensorError) as error:
        raise PolicyFileError(f"{what} {path} cannot be written ({error}); what was there before is intact") from None


def load_tensors(path: Path, what: str, keys: Collection[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors, on the CPU, and its metadata without the checksum.

    Args:
        path: the file.
        what: what to call it in errors.
        keys: what its metadata may have. Anything else is refused, or a flipped bit in the checksum's own name would
            make a file without one.

    Raises:
        PolicyFileError: it is missing, cannot be read or is not as it was written, naming `what` it is.
    """
    with _opened(path, what) as file:
        metadata: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = metadata.pop(CHECKSUM, None)
    unknown = metadata.keys() - set(keys)
    if unknown:
        raise PolicyFileError(f"{what} {path} has the unknown metadata {quoted(min(unknown))}")
    if expected is not None and expected != checksum(tensors, metadata):
        raise PolicyFileError(f"{what} {path} has changed since it was written: its checksum is another")
    return tensors, metadata


@contextlib.contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Gives the file's name to whatever error its contents lead to within.

    Raises:
        PolicyFileError: anything within was missing or of another type or shape, or such an error was raised.
    """
    try:
        yield
    except PolicyFileError as error:
        raise PolicyFileError(f"{what} {path}: {one_line(error, _MAX_CHARS)}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PolicyFileError(f"{what} {path} is damaged: {type(error).__name__} {one_line(error)}") from None


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata and every tensor's name, dtype, shape and bytes; the order does not matter.

    The tensors are contiguous, and on the CPU.
    """
    names = sorted(tensors)
    described = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), described]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    try:
        require_regular_file(path)
        with safe_open(path, framework="pt", device="cpu") as file, naming(path, what):
            yield file
    except FileNotFoundError:
        raise PolicyFileError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise PolicyFileError(f"{what} {path} cannot be read: {error.strerror or one_line(error)}") from None
    except SafetensorError as error:
        raise PolicyFileError(f"{what} {path} cannot be read: {one_line(error)}") from None
