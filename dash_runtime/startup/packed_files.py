"""Keeps a model as native code reads it: packed once, in a file for each part, which all workers and starts map.

Knows files and parts; knows no actions and no layers.
"""

import contextlib
import ctypes
import fcntl
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from dash_runtime.checkpoints import Weights
from dash_runtime.decoder.backends.packed_model import PackedModel, Part, Take, pack_by_layer
from dash_runtime.devices import device_of
from dash_runtime.files.atomic_file import replacing
from dash_runtime.files.disk_cache import digest
from dash_runtime.files.tensor_stream import TensorStream, is_as_written
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.progress import Progress, told
from dash_runtime.startup.process_memory import give_back_memory

_VERSION = 4
"""Raised when what is packed has another layout."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ, since Linux 5.14: reads a map's pages now, and not at the first token."""
_LEAST_COPIED = 1 << 20


class WeightsPlace(StrEnum):
    """Where weights lie that native code reads."""

    MAPPED = "mapped"
    """In the file's own memory, which all workers share."""
    COPIED = "copied"
    """In each worker's own memory, in huge pages."""


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """The files of one model.

    Args:
        folder: where they are; made when one is written.
        key: differs for other weights.
        loader: reads the weights.
        weights: what it reads them from.
        head_map: that of the narrow head.
    """

    folder: Path
    key: tuple[object, ...]
    loader: WeightLoader
    weights: Weights
    head_map: HeadMap | None = None

    def open(self, parts: Sequence[Part], place: WeightsPlace, progress: Progress) -> PackedModel:
        """Returns the model with these parts. What is missing or damaged is written, or packed in memory if that cannot
        be."""
        tensors: dict[str, Tensor] = {}
        missing = [part for part in parts if not is_as_written(self.path(part), progress)]
        if missing:
            try:
                self._write(missing, progress)
            except OSError as error:
                progress(
                    f"{self.folder} cannot be written ({error.strerror}): weights are packed in memory, every time"
                )
                self._pack(dict.fromkeys(missing, tensors.__setitem__), missing, progress)
                parts = [part for part in parts if part not in missing]
        for part in parts:
            with safe_open(self.path(part), framework="pt") as file:
                names = [name for name in file.keys() if not name.startswith("padding.")]  # noqa: SIM118
                own = {name: file.get_tensor(name) for name in names}
            for name, tensor in own.items():
                is_read_whole = name != "embedding" and tensor.nbytes >= _LEAST_COPIED
                if is_read_whole and place is WeightsPlace.COPIED:
                    own[name] = device_of(tensor.device).zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)
                elif is_read_whole:
                    _populate(tensor)
            tensors |= own
        return PackedModel(self.loader.config, tensors)

    def path(self, part: Part) -> Path:
        """Returns the file of a part."""
        more = (
            () if part is not Part.NARROW or self.head_map is None else (self.head_map.widen.flatten()[:64].tolist(),)
        )
        return self.folder / f"{digest((_VERSION, *self.key, *more))}-{part}.safetensors"

    def _write(self, parts: Sequence[Part], progress: Progress) -> None:
        """Writes parts that are missing, unless another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in self.folder.glob(".*.partial"):  # of a start that was stopped
                leftover.unlink(missing_ok=True)
            missing = [part for part in parts if not is_as_written(self.path(part), progress)]
            if not missing:
                return
            with contextlib.ExitStack() as stack:
                files = {
                    part: stack.enter_context(stack.enter_context(replacing(self.path(part))).open("wb"))
                    for part in missing
                }
                streams = {part: TensorStream(file) for part, file in files.items()}
                self._pack({part: stream.add for part, stream in streams.items()}, missing, progress)
                for stream in streams.values():
                    stream.finish({"format": "pt"})

    def _pack(self, takers: Mapping[Part, Take], parts: Sequence[Part], progress: Progress) -> None:
        what = f"packing weights for {', '.join(part.upper() for part in parts)} (once)"
        for _ in told(pack_by_layer(self.loader, takers, self.head_map), self.loader.config.num_layers, what, progress):
            self.weights.forget()
            give_back_memory()
        self.weights.forget()
        give_back_memory()


def _populate(tensor: Tensor) -> None:
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _POPULATE_READ)
