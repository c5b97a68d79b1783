"""The header of a GGUF file, as families read it: metadata and the names of tensors. Knows no file format."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

ScalarType = TypeVar("ScalarType", str, int, float, bool)


class GgufHeader(Protocol):
    """A GGUF file's metadata and tensors. Every method raises `CorruptCheckpoint` for a value of another type."""

    @property
    def tensors(self) -> Mapping[str, object]:
        """The file's tensors by name."""

    def get(self, key: str, kind: type[ScalarType]) -> ScalarType | None:
        """Returns the scalar called `key`, or None if the file has none."""

    def require(self, key: str, kind: type[ScalarType]) -> ScalarType:
        """Returns the scalar called `key`; raises `CorruptCheckpoint` if the file has none."""

    def get_list(self, key: str, kind: type[ScalarType]) -> list[ScalarType] | None:
        """Returns the array called `key`, or None if the file has none."""
