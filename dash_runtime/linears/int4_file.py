"""Keeps a model's INT4 matrices that were rounded with their inputs in view, since that takes minutes.

Knows files and matrices; knows no layers and no models but their fingerprint.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.errors import PolicyFileError
from dash_runtime.files.disk_cache import digest
from dash_runtime.files.tensor_file import checksum, load_tensors, naming, save_tensors
from dash_runtime.linears.int4_matrix import Int4Matrix, Place

_FORMAT = "dash-int4-1"
_WHAT = "INT4 file"
_KEYS = ("format", "model_fingerprint", "identity")


class KeptInt4(Mapping[Place, Int4Matrix]):
    """The matrices of a file, by place. They are unpacked when they are asked for, since that doubles their memory.

    `identity` differs between files with other weights; it is None without a file.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, identity: str | None = None) -> None:
        self._tensors = tensors or {}
        self._places = [_place(name) for name in self._tensors if name.endswith(".values")]
        self.identity = identity

    def __getitem__(self, place: Place) -> Int4Matrix:
        layer, number = place
        pairs, scales, offsets, units = (self._tensors[f"{layer}.{number}.{name}"] for name in Int4Matrix._fields)
        values = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
        return Int4Matrix(values, scales.to(torch.int16), offsets, units)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def int4_file(cache_folder: Path, fingerprint: str) -> Path:
    """Returns the file of the model with this fingerprint, whether there is one or not."""
    return cache_folder / "int4" / f"{digest(fingerprint)}.safetensors"


def save_int4(path: Path, matrices: Mapping[Place, Int4Matrix], fingerprint: str) -> None:
    """Writes the file in one rename.

    Raises:
        PolicyFileError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for (layer, place), matrix in matrices.items():
        own = matrix._replace(
            values=matrix.values[:, ::2] | matrix.values[:, 1::2] << 4, scales=matrix.scales.to(torch.uint8)
        )
        tensors |= {f"{layer}.{place}.{name}": tensor.contiguous() for name, tensor in own._asdict().items()}
    metadata = {"format": _FORMAT, "model_fingerprint": fingerprint, "identity": checksum(tensors, {})[:16]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolicyFileError(f"{_WHAT} {path} cannot be written: {error.strerror}") from None
    save_tensors(path, _WHAT, tensors, metadata)


def load_int4(path: Path, fingerprint: str) -> KeptInt4:
    """Reads the file of the model with this fingerprint; nothing, if there is none.

    Raises:
        PolicyFileError: it is damaged or was made for another model; the message names the file.
    """
    if not path.exists():
        return KeptInt4()
    try:
        tensors, metadata = load_tensors(path, _WHAT, _KEYS)
        with naming(path, _WHAT):
            if metadata["format"] != _FORMAT or metadata["model_fingerprint"] != fingerprint:
                raise PolicyFileError(f"is not of format {_FORMAT}, or was made for another model")
            return KeptInt4(tensors, metadata["identity"])
    except PolicyFileError as error:
        raise PolicyFileError(f"{error}; delete it to have each weight rounded to the nearest") from None


def _place(name: str) -> Place:
    layer, number, _ = name.split(".")
    return int(layer), int(number)
