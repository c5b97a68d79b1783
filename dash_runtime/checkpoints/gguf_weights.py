"""Writes a GGUF file's tensors as one bfloat16 model.safetensors, one tensor in memory at a time.

Knows both files' layouts; what llama.cpp changed in a model's tensors is asked of its family. Knows no torch.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dash_runtime.checkpoints.gguf_file import GgufFile, GgufTensor
from dash_runtime.checkpoints.gguf_rope import ROPE_TENSORS
from dash_runtime.checkpoints.parameters import parameter_shapes, parameters
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families import Family
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import ModelConfig
from dash_runtime.progress import Progress

if TYPE_CHECKING:
    import numpy as np

_BF16_BYTES = 2
_SECONDS_UNTOLD = 2.0
_MOST_VALUES = 1 << 21
"""Values of a large tensor that are converted together. They stay in the processor's cache."""
_NUM_CONVERTERS = min(4, os.cpu_count() or 1)


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


def write_weights(gguf: GgufFile, family: Family, config: ModelConfig, file: Path, progress: Progress) -> None:
    """Dequantises every parameter of `config` into `file`. Tells `progress` its share every few seconds.

    Raises:
        CorruptCheckpoint: a tensor is missing or has another shape than the metadata say.
        UnsupportedArchitecture: the file has tensors that the architecture here does not use.
    """
    shapes, sources = parameter_shapes(config), gguf_sources(config, family)
    _check_tensors(gguf, {source.name: source.shape for source in sources.values()})
    permuted_heads = family.gguf_permuted_heads(config)
    num_weights = sum(map(math.prod, shapes.values()))
    num_done, told_at = 0, -math.inf
    with file.open("wb") as out:
        out.write(_safetensors_header(shapes))
        for parameter, shape in shapes.items():
            if time.monotonic() - told_at > _SECONDS_UNTOLD:
                progress(f"converting {gguf.path.name} (once): {num_done / num_weights:.0%}")
                told_at = time.monotonic()
            source = sources[parameter]
            tensor = gguf.tensors[source.name]
            tensor = tensor if source.place is None else tensor.part(source.place)
            heads = next((heads for module, heads in permuted_heads.items() if f".{module}." in parameter), None)
            # llama.cpp has added the offset to norms.
            offset = config.block.norm_offset if len(shape) == 1 and parameter.endswith(".weight") else 0.0
            # The rows of permuted heads change places.
            parts = [tensor] if heads is not None else _in_parts(tensor)
            for converted in _mapped_ahead(partial(_converted, gguf, heads=heads, offset=offset), parts):
                out.write(converted)
            gguf.forget(tensor)
            num_done += math.prod(shape)


def _converted(gguf: GgufFile, tensor: GgufTensor, heads: int | None, offset: float) -> bytes:
    values = gguf.dequantize(tensor)
    if heads is not None:
        values = _unpermute(values, heads)
    return _bfloat16_bytes(values - offset if offset else values)


def _in_parts(tensor: GgufTensor) -> list[GgufTensor]:
    """Returns the tensor's rows, as many together as a conversion may have in memory."""
    num_rows, *others = tensor.shape
    count = max(1, _MOST_VALUES // math.prod(others)) if others else num_rows
    return [tensor.rows(first, count) for first in range(0, num_rows, count)]


def _mapped_ahead(convert: Callable[[GgufTensor], bytes], parts: Sequence[GgufTensor]) -> Iterator[bytes]:
    """Yields what each part is converted to, in order; a few are converted at the same time."""
    if len(parts) == 1:
        yield convert(parts[0])
        return
    with ThreadPoolExecutor(_NUM_CONVERTERS) as threads:
        waiting: deque[Future[bytes]] = deque()
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
