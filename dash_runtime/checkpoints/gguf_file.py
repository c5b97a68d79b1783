"""Reads the header of a GGUF file, or of all files of a split one, and hands out its tensors.

Every count, length and offset is checked against the file's size before it is used, so a damaged file ends in one
`CorruptCheckpoint` and never in a hang or a numpy error. The `gguf` package's own reader trusts them, and makes a numpy
array for each string of a vocabulary. Knows the container only: no architectures, tensor names or tokenizers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from ctypes import c_float
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dash_runtime.checkpoints.gguf_shards import gguf_model
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families.gguf_header import ScalarType
from dash_runtime.files.atomic_file import require_regular_file
from dash_runtime.files.wording import one_line, quoted

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
MAX_DIMENSIONS = 4

_MAX_VALUE = 3.38e38
"""Just below the largest number of bfloat16, to which every value is cast later."""

_STRING = 8
_ARRAY = 9
_BOOL = 7
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}

Scalar = str | int | float | bool
MetadataValue = Scalar | list[Scalar]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """The place of one tensor. `shape` is in torch's order: rows first."""

    path: Path
    name: str
    type_number: int
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int

    def part(self, index: int) -> "GgufTensor":
        """Returns one of the tensors that are stacked in this one."""
        count, *shape = self.shape
        size_bytes = self.size_bytes // count  # whole, since rows are whole blocks
        offset_bytes = self.offset_bytes + index * size_bytes
        return replace(self, shape=tuple(shape), offset_bytes=offset_bytes, size_bytes=size_bytes)

    def rows(self, first: int, count: int) -> "GgufTensor":
        """Returns some of its rows."""
        num_rows, *others = self.shape
        row_bytes = self.size_bytes // num_rows
        count = min(count, num_rows - first)
        place = self.offset_bytes + first * row_bytes
        return replace(self, shape=(count, *others), offset_bytes=place, size_bytes=count * row_bytes)


class GgufFile:
    """An open GGUF model: its metadata, and its tensors' descriptions by name.

    Args:
        path: its file, or any of its files if it was split.

    Raises:
        CorruptCheckpoint: a file is missing, is not GGUF, is truncated or contradicts itself.
        UnsupportedArchitecture: a version or byte order that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.paths = paths = gguf_model(path).paths
        self.path = paths[0]
        self._bytes = {own: _mapped(own) for own in paths}
        self.metadata: dict[str, MetadataValue] = {}
        self.tensors: dict[str, GgufTensor] = {}
        for part, (own_path, data) in enumerate(self._bytes.items()):
            cursor = _Cursor(own_path, data)
            metadata, tensors = _read_header(cursor)
            number, count = metadata.get("split.no", 0), metadata.get("split.count", 1) or 1
            if (number, count) != (part, len(paths)):
                own = f"part {quoted(number)} of {quoted(count)}"
                named = f"part {part} of {len(paths)}"
                raise cursor.corrupt(f"it says that it is {own}, counted from 0, and by its name it is {named}")
            if tensors.keys() & self.tensors.keys():
                raise cursor.corrupt("one of its tensors is in an earlier part, too")
            self.metadata = self.metadata or metadata
            self.tensors |= tensors

    def get(self, key: str, kind: type[ScalarType]) -> ScalarType | None:
        """Returns the scalar called `key`, or None if the file has none.

        A float is the short decimal that its float32 was written from: 1e-05, not 9.999999747378752e-06.

        Raises:
            CorruptCheckpoint: the value is of another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, float):
            value = short_decimal(value)
        if type(value) is not kind:
            raise CorruptCheckpoint(f"{self.path} is damaged: its metadata {key!r} is no {kind.__name__}.")
        return value

    def require(self, key: str, kind: type[ScalarType]) -> ScalarType:
        """Returns the scalar called `key`.

        Raises:
            CorruptCheckpoint: it is missing or of another type.
        """
        value = self.get(key, kind)
        if value is None:
            raise CorruptCheckpoint(f"{self.path} is incomplete: its metadata lacks {key!r}.")
        return value

    def require_list(self, key: str, kind: type[ScalarType]) -> list[ScalarType]:
        """Returns the array called `key`.

        Raises:
            CorruptCheckpoint: it is missing or holds another type.
        """
        values = self.get_list(key, kind)
        if values is None:
            raise CorruptCheckpoint(f"{self.path} is incomplete: its metadata lacks {key!r}.")
        return values

    def get_list(self, key: str, kind: type[ScalarType]) -> list[ScalarType] | None:
        """Returns the array called `key`, or None if the file has none.

        Raises:
            CorruptCheckpoint: it holds another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise CorruptCheckpoint(f"{self.path} is damaged: its metadata {key!r} is no list of {kind.__name__}.")
        return cast(list[ScalarType], value)

    def forget(self, tensor: GgufTensor) -> None:
        """Gives up the memory of a tensor that was read."""
        first = tensor.offset_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            end = tensor.offset_bytes + tensor.size_bytes
            self._bytes[tensor.path].madvise(mmap.MADV_DONTNEED, first, end - first)

    def dequantize(self, tensor: GgufTensor) -> "np.ndarray":
        """Returns the tensor's values as float32, in the tensor's shape.

        Raises:
            CorruptCheckpoint: a value is not finite, or would not be finite in bfloat16.
            UnsupportedArchitecture: the quantisation has no decoder in the `gguf` package.
        """
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(tensor.type_number)
        raw = np.frombuffer(self._bytes[tensor.path], np.uint8, tensor.size_bytes, tensor.offset_bytes)
        rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)  # [num_rows, row_bytes]
        try:
            with np.errstate(all="ignore"):  # the values that damaged scales give are refused below
                values = dequantize(rows, kind)
        except NotImplementedError:
            raise UnsupportedArchitecture(
                f"{tensor.path} stores {one_line(tensor.name)} as {kind.name}, which cannot be decoded; "
                "use a file in F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant."
            ) from None
        # NaN compares as false, so this form refuses it too.
        if not (values.min() > -_MAX_VALUE and values.max() < _MAX_VALUE):
            raise CorruptCheckpoint(
                f"{tensor.path} is damaged: its tensor {quoted(tensor.name)} holds a value that is not finite."
            )
        return cast("np.ndarray", values.reshape(tensor.shape))


def short_decimal(value: float) -> float:
    """Returns the short decimal that a float32 was written from, or `value` if there is none."""
    short = float(f"{value:.7g}")
    return short if c_float(short).value == c_float(value).value else value


def _mapped(path: Path) -> mmap.mmap:
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CorruptCheckpoint(f"{path} is empty.") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from None


@dataclass(slots=True)
class _Cursor:
    """A position in a file that refuses to pass its end."""

    path: Path
    data: mmap.mmap
    offset: int = 0

    def corrupt(self, reason: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.path} is damaged or incomplete: {reason}.")

    def require(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.offset:
            raise self.corrupt("it ends inside its header")

    def unsigned(self, code: str) -> int:
        return cast(int, self.scalars(code, 1)[0])

    def scalars(self, code: str, count: int) -> list[Scalar]:
        size = struct.calcsize("<" + code)
        self.require(size * count)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.offset)
        self.offset += size * count
        return list(values)

    def string(self) -> str:
        length = self.unsigned("Q")
        self.require(length)
        start = self.offset
        self.offset += length
        try:
            return self.data[start : self.offset].decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt("a text in its header is not UTF-8") from None

    def value(self) -> MetadataValue:
        kind = self.unsigned("I")
        if kind != _ARRAY:
            return self.values(kind, 1, "a value")[0]
        kind = self.unsigned("I")
        return self.values(kind, self.unsigned("Q"), "an array")

    def values(self, kind: int, count: int, what: str) -> list[Scalar]:
        if kind == _STRING:
            self.require(8 * count)  # each has a length at least
            return [self.string() for _ in range(count)]
        if kind not in _SCALAR_FORMATS:
            raise self.corrupt(f"{what} in its header is of the unknown type {kind}")
        values = self.scalars(_SCALAR_FORMATS[kind], count)
        return [self.boolean(value) for value in values] if kind == _BOOL else values

    def boolean(self, value: Scalar) -> bool:
        if value not in (0, 1):
            raise self.corrupt(f"a truth value in its header is {value}")
        return bool(value)


def _read_header(cursor: _Cursor) -> tuple[dict[str, MetadataValue], dict[str, GgufTensor]]:
    if cursor.data[: len(MAGIC)] != MAGIC:
        raise CorruptCheckpoint(f"{cursor.path} is not a GGUF file.")
    cursor.offset = len(MAGIC)
    version = cursor.unsigned("I")
    if version not in SUPPORTED_VERSIONS:
        supported = " and ".join(map(str, SUPPORTED_VERSIONS))
        raise UnsupportedArchitecture(
            f"{cursor.path} is GGUF version {version} or big-endian; versions {supported}, "
            "little-endian, are supported."
        )
    num_tensors = cursor.unsigned("Q")
    num_values = cursor.unsigned("Q")
    metadata: dict[str, MetadataValue] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise cursor.corrupt(f"its header has two values for {quoted(key)}")
        metadata[key] = cursor.value()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.corrupt("its alignment is not a power of two")
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    end = 0
    for name, type_number, shape, offset in entries:
        size = _size_bytes(cursor, name, type_number, shape)
        # The format demands tensors without gaps. A tensor elsewhere would overlap another, or leave bytes unread.
        if offset != end:
            raise cursor.corrupt(f"its tensor {quoted(name)} is not where the one before it ends")
        if data_start + offset + size > len(cursor.data):
            raise cursor.corrupt(f"it ends before its tensor {quoted(name)} does")
        tensors[name] = GgufTensor(cursor.path, name, type_number, shape, data_start + offset, size)
        end = -(-(offset + size) // alignment) * alignment
    if len(tensors) != num_tensors:
        raise cursor.corrupt("two of its tensors have one name")
    if len(cursor.data) > data_start + end:
        raise cursor.corrupt("it goes on after its last tensor")
    return metadata, tensors


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string()
    num_dimensions = cursor.unsigned("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.corrupt(f"its tensor {quoted(name)} has {num_dimensions} dimensions")
    dimensions = cast(list[int], cursor.scalars("Q", num_dimensions))
    type_number = cursor.unsigned("I")
    return name, type_number, tuple(reversed(dimensions)), cursor.unsigned("Q")


def _size_bytes(cursor: _Cursor, name: str, type_number: int, shape: tuple[int, ...]) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block_length, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_number)]
    except (ValueError, KeyError):
        raise cursor.corrupt(f"its tensor {quoted(name)} is of the unknown type {type_number}") from None
    if min(shape) < 1 or shape[-1] % block_length:
        raise cursor.corrupt(f"its tensor {quoted(name)} has the impossible shape {list(shape)}")
    return math.prod(shape) // block_length * block_bytes
