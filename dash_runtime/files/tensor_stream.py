"""Writes a safetensors file one tensor after another, so that only one is in memory, and checks what it reads.

A file that is ready has the digest of every tensor. Knows files; knows nothing of what is in them.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dash_runtime.files.checked_once import fault_of

_HEADER_BYTES = 1 << 21
"""The header's room: it is written last, when all tensors are known. Tensors begin with a huge page."""
_ALIGNMENT = 64
_DIGESTS = "sha256"
_READ_BYTES = 1 << 20
_MOST_THREADS = 4
_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class TensorStream:
    """Writes into a binary file that is empty. Until `finish` it is no safetensors file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._header: dict[str, object] = {}
        self._digests: dict[str, str] = {}
        self._end = 0
        file.seek(_HEADER_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor on the CPU.

        Raises:
            OSError: the disk is full, say.
        """
        contents = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._append(name, _DTYPES[tensor.dtype], list(tensor.shape), contents)
        self._digests[name] = hashlib.sha256(contents).hexdigest()
        if missing := -self._end % _ALIGNMENT:
            self._append(f"padding.{len(self._header)}", "U8", [missing], bytes(missing))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header, and everything to the disk."""
        self._header["__metadata__"] = {**metadata, _DIGESTS: json.dumps(self._digests)}
        text = json.dumps(self._header, separators=(",", ":")).encode()
        room = _HEADER_BYTES - 8
        assert len(text) <= room, f"a header of {len(text)} bytes"
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + text.ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _append(self, name: str, dtype: str, shape: list[int], contents: bytes | memoryview) -> None:
        start, self._end = self._end, self._end + len(contents)
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, self._end]}
        self._file.write(contents)


def is_as_written(path: Path, tell: Callable[[str], None]) -> bool:
    """Returns True if the file is there as a `TensorStream` wrote it. Tells if it has changed."""
    try:
        changed = fault_of(path, lambda: changed_tensor(path))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        changed = "the header"
    if changed is not None:
        tell(f"{path} has changed since it was written ({changed}): making it again")
    return changed is None


def changed_tensor(path: Path) -> str | None:
    """Returns the name of a tensor that is not as it was written, or None. Reads the file without mapping it.

    Raises:
        OSError: it cannot be read.
        ValueError: it was not written by a `TensorStream`, or not to its end.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        room = int.from_bytes(file.read(8), "little")
        if room != _HEADER_BYTES - 8:
            raise ValueError(f"{path} is no finished file of tensors")
        header = json.loads(file.read(room))
        digests = json.loads(header.pop("__metadata__")[_DIGESTS])

        def is_changed(name: str) -> bool:
            first, last = (_HEADER_BYTES + offset for offset in header[name]["data_offsets"])
            if last > size:
                return True
            digest, memory = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
            while first < last:
                count = os.preadv(file.fileno(), [memory[: last - first]], first)
                if not count:
                    return True
                digest.update(memory[:count])
                first += count
            return digest.hexdigest() != digests[name]

        largest_first = sorted(digests, key=lambda name: -math.prod(header[name]["shape"]))
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
            found = threads.map(is_changed, largest_first)
            return next((name for name, is_other in zip(largest_first, found, strict=True) if is_other), None)
