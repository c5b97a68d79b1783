"""Keeps a model's matrices that were rounded with their inputs in view, since that takes minutes.

Knows files and matrices; knows no layers and no models but their fingerprint.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.errors import PolicyFileError
from dash_runtime.files.disk_cache import digest
from dash_runtime.files.tensor_file import checksum, load_tensors, naming, save_tensors
from dash_runtime.linears.grouped_matrix import GroupedMatrix, Place, Rounding
from dash_runtime.linears.quantization import BITS

_FORMAT = "dash-rounding-1"
_WHAT = "rounding file"
_KEYS = ("format", "model_fingerprint", "identity")


class _Kept(Mapping[Place, GroupedMatrix]):
    """The matrices of one action. They are unpacked when they are asked for, since that doubles their memory."""

    def __init__(self, action: Action, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._action = tensors, action
        self._places = [_place(name) for name in tensors if _is_values_of(action, name)]

    def __getitem__(self, place: Place) -> GroupedMatrix:
        layer, number = place
        prefix = f"{self._action.name}.{layer}.{number}."
        pairs, scales, offsets, units = (
            self._tensors[prefix + name] for name in ("values", "scales", "offsets", "units")
        )
        values = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
        return GroupedMatrix(values, scales.to(torch.int16), offsets, units, BITS[self._action])

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class KeptRounding(Mapping[Action, Mapping[Place, GroupedMatrix]]):
    """The matrices of a file, by action and place.

    `identity` differs between files with other weights; it is None without a file.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, identity: str | None = None) -> None:
        own = {action: _Kept(action, tensors or {}) for action in BITS}
        self._by_action = {action: kept for action, kept in own.items() if kept}
        self.identity = identity

    def __getitem__(self, action: Action) -> Mapping[Place, GroupedMatrix]:
        return self._by_action[action]

    def __iter__(self) -> Iterator[Action]:
        return iter(self._by_action)

    def __len__(self) -> int:
        return len(self._by_action)


def rounding_file(cache_folder: Path, fingerprint: str) -> Path:
    """Returns the file of the model with this fingerprint, whether there is one or not."""
    return cache_folder / "rounding" / f"{digest(fingerprint)}.safetensors"


def save_rounding(path: Path, rounding: Rounding, fingerprint: str) -> None:
    """Writes the file in one rename.

    Raises:
        PolicyFileError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for action, matrices in rounding.items():
        for (layer, number), matrix in matrices.items():
            own = matrix.tensors()
            own["values"] = matrix.values[:, ::2] | matrix.values[:, 1::2] << 4
            own["scales"] = matrix.scales.to(torch.uint8)
            tensors |= {f"{action.name}.{layer}.{number}.{name}": tensor.contiguous() for name, tensor in own.items()}
    metadata = {"format": _FORMAT, "model_fingerprint": fingerprint, "identity": checksum(tensors, {})[:16]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolicyFileError(f"{_WHAT} {path} cannot be written: {error.strerror}") from None
    save_tensors(path, _WHAT, tensors, metadata)


def load_rounding(path: Path, fingerprint: str) -> KeptRounding:
    """Reads the file of the model with this fingerprint; nothing, if there is none.

    Raises:
        PolicyFileError: it is damaged or was made for another model; the message names the file.
    """
    if not path.exists():
        return KeptRounding()
    try:
        tensors, metadata = load_tensors(path, _WHAT, _KEYS)
        with naming(path, _WHAT):
            if metadata["format"] != _FORMAT or metadata["model_fingerprint"] != fingerprint:
                raise PolicyFileError(f"is not of format {_FORMAT}, or was made for another model")
            return KeptRounding(tensors, metadata["identity"])
    except PolicyFileError as error:
        raise PolicyFileError(f"{error}; delete it to have each weight rounded to the nearest") from None


def _is_values_of(action: Action, name: str) -> bool:
    return name.startswith(f"{action.name}.") and name.endswith(".values")


def _place(name: str) -> Place:
    _, layer, number, _ = name.split(".")
    return int(layer), int(number)
