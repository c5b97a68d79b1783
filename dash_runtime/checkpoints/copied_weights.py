"""Copies weights that are costly to read into a file that reading maps. Knows files; knows no layers."""

import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from dash_runtime.checkpoints.gguf_weights import GgufWeights
from dash_runtime.checkpoints.weights import SafetensorsWeights, Weights
from dash_runtime.errors import CheckpointError
from dash_runtime.files.atomic_file import replacing
from dash_runtime.files.disk_cache import digest
from dash_runtime.files.tensor_stream import TensorStream, is_as_written
from dash_runtime.progress import Progress, told


def copied(weights: Weights, folder: Path, progress: Progress) -> Weights:
    """Returns the same weights for those who read them at every start, or time and again: those of a GGUF file from a
    copy in bfloat16, which is made in `folder` once.

    Raises:
        CorruptCheckpoint: a tensor is damaged.
        CheckpointError: the copy cannot be written.
    """
    if not isinstance(weights, GgufWeights):
        return weights
    path = folder / f"{digest(weights.identity)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_as_written(path, progress):
                _write(weights, path, progress)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from None
    return SafetensorsWeights(folder, dict.fromkeys(weights, path))


def _write(weights: Mapping[str, Tensor], path: Path, progress: Progress) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        stream = TensorStream(file)
        for _ in told(_added(weights, stream), len(weights), "converting weights to bfloat16 (once)", progress):
            pass
        stream.finish({"format": "pt"})


def _added(weights: Mapping[str, Tensor], stream: TensorStream) -> Iterator[int]:
    for count, (name, tensor) in enumerate(weights.items(), start=1):
        stream.add(name, tensor)
        yield count
