"""Weights that stay in a GGUF file: a folder says where it is, and what is read is dequantised.

So a model takes no disk besides its file, and its first start no time to copy it. Knows files and shapes; knows neither
what a parameter is for nor the device and dtype it will have.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.gguf_parameters import GgufParameters
from dash_runtime.checkpoints.weights import GGUF_PLACE_FILE, MissingTensor, Weights, require_shape
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint
from dash_runtime.files.json_file import read_json_object

if TYPE_CHECKING:
    import numpy as np
    import torch


class _File(msgspec.Struct, frozen=True):
    """A file as it was when the folder was written."""

    path: str
    size_bytes: int
    mtime_ns: int

    @classmethod
    def now(cls, path: Path) -> "_File":
        status = path.stat()
        return cls(str(path.absolute()), status.st_size, status.st_mtime_ns)


class _Place(msgspec.Struct, frozen=True):
    """Where a model's weights are, and the shape of each parameter."""

    files: list[_File]
    shapes: dict[str, tuple[int, ...]]


def write_place(parameters: GgufParameters, folder: Path) -> None:
    """Writes into a folder where its model's weights are."""
    place = _Place([_File.now(path) for path in parameters.files], parameters.shapes)
    (folder / GGUF_PLACE_FILE).write_text(json.dumps(msgspec.to_builtins(place)), encoding="utf-8")


class GgufWeights(Weights):
    """The tensors of a model in a GGUF file by name, dequantised to bfloat16 when asked for.

    Raises:
        CheckpointNotFound: the file is gone.
        CorruptCheckpoint: the file has changed since the folder was written, or the folder's own file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._place = msgspec.convert(read_json_object(folder / GGUF_PLACE_FILE), _Place)
        except (msgspec.ValidationError, RecursionError):
            raise CorruptCheckpoint(f"{folder / GGUF_PLACE_FILE} is damaged; delete the folder {folder}.") from None
        for own in self._place.files:
            try:
                is_same = _File.now(Path(own.path)) == own
            except OSError:
                raise CheckpointNotFound(f"There is no file {own.path}, which has the weights of {folder}.") from None
            if not is_same:
                raise CorruptCheckpoint(f"{own.path} is another file than {folder} was made from.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._place.shapes)

    def __len__(self) -> int:
        return len(self._place.shapes)

    def __getitem__(self, name: str) -> "torch.Tensor":
        import torch

        tensor, end = torch.empty(self._shape(name), dtype=torch.bfloat16), 0
        for part in self._parameters.parts(name, _rounded):
            tensor.view(-1)[end : end + part.numel()] = part.view(-1)
            end += part.numel()
        return tensor

    @property
    def identity(self) -> tuple[tuple[str, int, int], ...]:
        return tuple((own.path, own.size_bytes, own.mtime_ns) for own in self._place.files)

    def forget(self) -> None:
        pass  # each tensor's memory is given up when it has been read

    def rows(self, name: str, rows: Sequence[int]) -> "torch.Tensor":
        self._shape(name)
        return _rounded(self._parameters.rows(name, rows))

    def file(self, name: str) -> Path:
        return self._parameters.file(name)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        require_shape(Path(self._place.files[0].path), name, self._shape(name), shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._place.shapes.get(name)
        if shape is None:
            raise MissingTensor(f"{self._place.files[0].path}: tensor {name} is missing, but config.json asks for it.")
        return shape

    @cached_property
    def _parameters(self) -> GgufParameters:
        """Reads the file's header: nobody needs it who reads no tensor."""
        from dash_runtime.checkpoints.gguf_config import config_keys, gguf_family
        from dash_runtime.checkpoints.hf_config import parse_model_config

        path = Path(self._place.files[0].path)
        gguf = GgufFile(path)
        family = gguf_family(gguf)
        return GgufParameters(gguf, family, parse_model_config(config_keys(gguf, family), path.stem, path))


def _rounded(values: "np.ndarray") -> "torch.Tensor":
    import torch

    # What the file has unrounded is still its own memory, which torch must not write to.
    own = values if values.flags.writeable else values.copy()
    return torch.from_numpy(own).to(torch.bfloat16)
