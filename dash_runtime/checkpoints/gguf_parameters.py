"""Reads a GGUF file's tensors as a model's parameters, some rows at a time, and writes them as safetensors.

Knows both files' layouts; what llama.cpp changed in a model's tensors is asked of its family. Knows no torch.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from dash_runtime.checkpoints.gguf_file import GgufFile, GgufTensor
from dash_runtime.checkpoints.gguf_rope import ROPE_TENSORS
from dash_runtime.checkpoints.parameters import parameter_shapes, parameters
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families import Family
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import ModelConfig
from dash_runtime.progress import Progress, told

if TYPE_CHECKING:
    import numpy as np

_BF16_BYTES = 2
_MOST_VALUES = 1 << 21
"""Values of a large tensor that are converted together. They stay in the processor's cache."""
_NUM_CONVERTERS = min(4, os.cpu_count() or 1)
Finished = TypeVar("Finished")


class GgufSource(NamedTuple):
    """The tensor of a GGUF file, such as `blk.3.attn_q.weight`, that holds a parameter.

    `place` is the parameter's among those that the tensor stacks, None if it is the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    place: int | None


def gguf_sources(config: ModelConfig, family: Family) -> dict[str, GgufSource]:
    """Returns where llama.cpp's converter puts each parameter."""
    in_gguf = replace(config, tensor_names=family.gguf_tensor_names)
    sources = {}
    for own, theirs in zip(parameters(config), parameters(in_gguf), strict=True):
        is_stacked = len(theirs.shape) > len(own.shape)
        for place, name in enumerate(own.names):
            if is_stacked:
                sources[name] = GgufSource(theirs.names[0], theirs.shape, place)
            else:
                sources[name] = GgufSource(theirs.names[place], theirs.shape, None)
    return sources


class GgufParameters:
    """The parameters of a model in a GGUF file, dequantised when they are asked for.

    Raises:
        CorruptCheckpoint: a tensor is missing or has another shape than the metadata say.
        UnsupportedArchitecture: the file has tensors that the architecture here does not use.
    """

    def __init__(self, gguf: GgufFile, family: Family, config: ModelConfig) -> None:
        self.shapes = parameter_shapes(config)
        self._gguf = gguf
        self._sources = gguf_sources(config, family)
        self._permuted_heads = family.gguf_permuted_heads(config)
        self._norm_offset = config.block.norm_offset
        _check_tensors(gguf, {source.name: source.shape for source in self._sources.values()})

    @property
    def files(self) -> list[Path]:
        """The model's files in order."""
        return self._gguf.paths

    def file(self, name: str) -> Path:
        """Returns the file that holds a parameter."""
        return self._tensor(name).path

    def parts(self, name: str, finish: "Callable[[np.ndarray], Finished]") -> Iterator[Finished]:
        """Yields a parameter's values, some rows at a time and each finished by `finish`, in several threads. What is
        made ahead is small."""
        tensor, heads = self._tensor(name), self._heads(name)
        # llama.cpp has added the offset to norms.
        is_norm = len(self.shapes[name]) == 1 and name.endswith(".weight")
        offset = self._norm_offset if is_norm else 0.0

        def finished(part: GgufTensor) -> Finished:
            values = self._gguf.dequantize(part)
            values = values if heads is None else _unpermute(values, heads)
            return finish(values - offset if offset else values)

        # The rows of permuted heads change places.
        yield from _mapped_ahead(finished, [tensor] if heads is not None else _in_parts(tensor))
        self._gguf.forget(tensor)

    def rows(self, name: str, rows: Sequence[int]) -> "np.ndarray":
        """Returns some rows of a matrix. Reads no others."""
        import numpy as np

        tensor, heads = self._tensor(name), self._heads(name)
        places = np.arange(tensor.shape[0])
        places = places if heads is None else _unpermute(places, heads)
        values = np.concatenate([self._gguf.dequantize(tensor.rows(int(places[row]), 1)) for row in rows])
        self._gguf.forget(tensor)  # the system may map much more than was read
        return values

    def _tensor(self, name: str) -> GgufTensor:
        source = self._sources[name]
        tensor = self._gguf.tensors[source.name]
        return tensor if source.place is None else tensor.part(source.place)

    def _heads(self, name: str) -> int | None:
        return next((heads for module, heads in self._permuted_heads.items() if f".{module}." in name), None)


def write_weights(parameters: GgufParameters, file: Path, what: str, progress: Progress) -> None:
    """Writes every parameter into `file`. Tells `progress` how far it is."""
    num_weights = sum(map(math.prod, parameters.shapes.values()))
    with file.open("wb") as out:
        out.write(_safetensors_header(parameters.shapes))
        for _ in told(_written(parameters, out), num_weights, f"converting {what} (once)", progress):
            pass


def _written(parameters: GgufParameters, out: BinaryIO) -> Iterator[int]:
    num_done = 0
    for name, shape in parameters.shapes.items():
        for part in parameters.parts(name, _bfloat16_bytes):
            out.write(part)
        num_done += math.prod(shape)
        yield num_done


def _in_parts(tensor: GgufTensor) -> list[GgufTensor]:
    """Returns the tensor's rows, as many together as a conversion may have in memory."""
    num_rows, *others = tensor.shape
    count = max(1, _MOST_VALUES // math.prod(others)) if others else num_rows
    return [tensor.rows(first, count) for first in range(0, num_rows, count)]


def _mapped_ahead(convert: Callable[[GgufTensor], Finished], parts: Sequence[GgufTensor]) -> Iterator[Finished]:
    """Yields what each part is converted to, in order; a few are converted at the same time."""
    if len(parts) == 1:
        yield convert(parts[0])
        return
    with ThreadPoolExecutor(_NUM_CONVERTERS) as threads:
        waiting: deque[Future[Finished]] = deque()
        for part in parts:
            waiting.append(threads.submit(convert, part))
            if len(waiting) > _NUM_CONVERTERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_tensors(gguf: GgufFile, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise CorruptCheckpoint(f"{gguf.path} is incomplete: it has no tensor {name}.")
        if tensor.shape != shape:
            raise CorruptCheckpoint(
                f"{gguf.path} is damaged: its tensor {name} has the shape {list(tensor.shape)}, "
                f"but its metadata ask for {list(shape)}."
            )
    unused = gguf.tensors.keys() - shapes.keys() - ROPE_TENSORS
    if unused:
        raise UnsupportedArchitecture(f"{gguf.path} has a tensor that is not supported: {quoted(min(unused))}.")


def _safetensors_header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Returns the length and header of a file with these tensors in this order, in bfloat16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for parameter, shape in shapes.items():
        start, end = end, end + _BF16_BYTES * math.prod(shape)
        header[parameter] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must be aligned to be mapped
    return len(text).to_bytes(8, "little") + text


def _unpermute(values: "np.ndarray", heads: int) -> "np.ndarray":
    """Puts rows from (pair, half) order, which ggml's rotary embedding expects, back into (half, pair)."""
    paired = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, head_dim / 2, 2, ...]
    return paired.swapaxes(1, 2).reshape(values.shape)


def _bfloat16_bytes(values: "np.ndarray") -> bytes:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    rows = values.reshape(-1, values.shape[-1])
    return quantize(rows, GGMLQuantizationType.BF16).tobytes()
