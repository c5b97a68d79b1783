"""Reads the weights of a folder, one tensor at a time. Safetensors and GGUF only, never pickle.

Knows names, shapes and files; knows neither what a parameter is for nor the device and dtype it will have.
"""

import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_runtime.checkpoints.parameters import parameter_shapes, unused_parameter
from dash_runtime.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.atomic_file import require_regular_file
from dash_runtime.files.json_file import read_json_object
from dash_runtime.files.wording import one_line, quoted
from dash_runtime.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GGUF_PLACE_FILE = "model.gguf.json"
"""Says where the weights of a folder without safetensors are."""
_READS_TO_FORGET = 8
SUPPORTED_DTYPES = ("BF16", "F16", "F32")


class MissingTensor(CorruptCheckpoint, KeyError):
    """A tensor that the model needs is in none of its files. Also a KeyError, which `Mapping` needs."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError.__str__ would put the sentence in quotes


class Weights(Mapping[str, "torch.Tensor"]):
    """Tensors by name, read from disk when asked for.

    To read one raises CorruptCheckpoint if no file has it, or if it holds a value that is not finite.
    """

    @property
    @abstractmethod
    def identity(self) -> tuple[tuple[str, int, int], ...]:
        """Differs if a file has been replaced or written to: path, size and time of each."""

    @abstractmethod
    def forget(self) -> None:
        """Gives up the memory of what was read. Tensors that share it keep it."""

    @abstractmethod
    def rows(self, name: str, rows: Sequence[int]) -> "torch.Tensor":
        """Returns some rows of a matrix. Reads no others.

        Raises:
            CorruptCheckpoint: no file has it, or they hold a value that is not finite.
        """

    @abstractmethod
    def file(self, name: str) -> Path:
        """Returns the file that holds the tensor called `name`."""

    @abstractmethod
    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Compares a tensor's description in the file with what the model needs. Does not read the tensor.

        Raises:
            CorruptCheckpoint: no file has it, or it has another shape.
            UnsupportedArchitecture: it is not stored as floating point of 16 or 32 bits.
        """


class SafetensorsWeights(Weights):
    """The tensors of some safetensors files."""

    def __init__(self, folder: Path, files: Mapping[str, Path]) -> None:
        self.folder = folder
        self._files = files
        self._num_read = 0
        self._handles = {file: open_safetensors(file, "pt") for file in set(files.values())}
        self._names_in = {file: frozenset(handle.keys()) for file, handle in self._handles.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self._checked(name, self._handle(name).get_tensor(name))

    @property
    def identity(self) -> tuple[tuple[str, int, int], ...]:
        statuses = [(file.resolve(), file.stat()) for file in sorted(self._handles)]
        return tuple((str(file), status.st_size, status.st_mtime_ns) for file, status in statuses)

    def forget(self) -> None:
        self._handles = {file: open_safetensors(file, "pt") for file in self._handles}

    def rows(self, name: str, rows: Sequence[int]) -> "torch.Tensor":
        import torch

        described = self._handle(name).get_slice(name)
        chosen = torch.cat([described[row : row + 1] for row in rows])
        self._num_read += 1
        if self._num_read % _READS_TO_FORGET == 0:
            self.forget()  # the system may map much more than was read
        return self._checked(name, chosen)

    def file(self, name: str) -> Path:
        return self._files[name]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        try:
            described = self._handle(name).get_slice(name)
        except MissingTensor as error:
            raise MissingTensor(f"{str(error).rstrip('.')}, but config.json asks for it.") from None
        require_shape(self._files[name], name, tuple(described.get_shape()), shape)
        dtype = described.get_dtype()
        if dtype not in SUPPORTED_DTYPES:
            raise UnsupportedArchitecture(
                f"{self._files[name]} stores {name} as {dtype}; supported: {', '.join(SUPPORTED_DTYPES)}."
            )

    def _checked(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        if not _is_finite(tensor):
            raise CorruptCheckpoint(f"{self._files[name]}: tensor {name} holds a value that is not finite.")
        return tensor

    def _handle(self, name: str) -> Any:
        file = self._files.get(name)
        if file is None:
            where = self.folder / (INDEX_FILE if len(self._handles) > 1 else WEIGHTS_FILE)
            raise MissingTensor(f"{where}: tensor {name} is missing.")
        if name not in self._names_in[file]:
            raise MissingTensor(f"{file}: tensor {name} is missing, though {INDEX_FILE} places it there.")
        return self._handles[file]


def open_weights(folder: Path) -> Weights:
    """Opens model.safetensors, or the shards that model.safetensors.index.json lists, or the GGUF file that the folder
    was made from.

    Raises:
        CheckpointNotFound: the folder or its weights are missing.
        CorruptCheckpoint: a file is truncated, missing or not safetensors.
    """
    single = folder / WEIGHTS_FILE
    if single.exists():
        return SafetensorsWeights(folder, dict.fromkeys(open_safetensors(single, "pt").keys(), single))
    index = folder / INDEX_FILE
    if index.exists():
        return SafetensorsWeights(folder, _read_index(index))
    if not (folder / GGUF_PLACE_FILE).exists():
        raise missing_weights(folder)
    from dash_runtime.checkpoints.gguf_weights import GgufWeights  # imports this file

    return GgufWeights(folder)


def check_weights(weights: Weights, config: ModelConfig) -> None:
    """Checks that the weights have every parameter of `config` in its shape, and none that `config` leaves out.

    Reads no parameter.

    Raises:
        CorruptCheckpoint: naming the file and the tensor.
        UnsupportedArchitecture: a parameter is stored in a dtype that is not supported.
    """
    for name, shape in parameter_shapes(config).items():
        weights.check(name, shape)
    unused = unused_parameter(weights, config)
    if unused is not None:
        raise CorruptCheckpoint(f"{weights.file(unused)}: config.json asks for no tensor {quoted(unused)}.")


def require_shape(file: Path, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises CorruptCheckpoint if the tensor that was found in the file has another shape than the model needs."""
    if found != shape:
        raise CorruptCheckpoint(
            f"{file}: tensor {name} has the shape {list(found)}, but config.json asks for {list(shape)}."
        )


def missing_weights(folder: Path) -> CheckpointError:
    """Returns the error that says what a folder has instead of safetensors."""
    if not folder.is_dir():
        return CheckpointNotFound(f"There is no folder {folder}.")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return CheckpointError(f"{folder} has PyTorch pickle weights; weights are read as safetensors only.")
    return CheckpointNotFound(
        f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; weights are read as safetensors only."
    )


def _read_index(index: Path) -> dict[str, Path]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CorruptCheckpoint(f"{index} has no weight_map.")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CorruptCheckpoint(
                f"{index} places {quoted(name)} in {quoted(file)}, which is not a safetensors file beside it."
            )
    files = {name: index.parent / file for name, file in places.items()}
    for path in sorted(set(files.values())):
        if not os.path.lexists(path):
            raise CorruptCheckpoint(f"{index.parent / one_line(path.name)} is missing, which {index} lists.")
    return files


def open_safetensors(file: Path, framework: str) -> Any:
    """Opens a file and checks its header against its size. Imports torch only for the framework `pt`.

    Raises:
        CorruptCheckpoint: naming the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        require_regular_file(file)
        return safe_open(file, framework=framework)
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{file} is missing.") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{file} cannot be read: {error.strerror}.") from None
    except (SafetensorError, ValueError) as error:
        raise CorruptCheckpoint(f"{file} is truncated or not a safetensors file ({one_line(error)}).") from None


def _is_finite(tensor: "torch.Tensor") -> bool:
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # The sum is many times faster than testing every number, and is not finite if one of them is not. It may also
    # overflow by itself.
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(tensor.isfinite().all())
