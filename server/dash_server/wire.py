"""Parses request bytes. Errors name the field that does not parse.

grpc.aio fails a call with UNKNOWN if its deserialiser raises. So handlers take the bytes and parse them here. Knows the
protobuf wire format, and no field's meaning.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from dash_runtime.errors import InvalidRequest

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MOST_VARINT_BYTES = 10
_MOST_PARTS = 1 << 14
"""Messages in a request. An empty one takes two bytes on the wire, and hundreds once it is parsed."""

M = TypeVar("M", bound=Message)


class _TooManyParts(Exception):
    """The bytes have more messages in them than anybody needs."""


def parse(message_class: type[M], data: bytes) -> M:
    """Parses the message in `data`.

    Raises:
        InvalidRequest: the bytes are not such a message, a string is not UTF-8, there are too many parts, or two
            members of one oneof are set (protobuf itself would silently keep the last).
    """
    descriptor = message_class.DESCRIPTOR
    try:
        # Before anything is made of the bytes.
        count = _Count() if len(data) > 2 * _MOST_PARTS else None
        path = next(_doubly_set_oneofs(descriptor, [memoryview(data)], "", count), None)
        message = message_class.FromString(data)
    except _TooManyParts:
        raise InvalidRequest("request", f"has more than {_MOST_PARTS} messages in it") from None
    except (DecodeError, RecursionError):
        raise _parse_error(descriptor, data) from None
    if path is not None:
        raise InvalidRequest(path, "must be set only once, but two of its members are set")
    return message


def _parse_error(descriptor: Descriptor, data: bytes) -> InvalidRequest:
    try:
        path = next(_invalid_strings(descriptor, memoryview(data), ""), None)
    except (DecodeError, RecursionError):
        path = None
    if path is not None:
        return InvalidRequest(path, "is not valid UTF-8")
    return InvalidRequest("request", f"the bytes are not a {descriptor.full_name}")


class _Count:
    """Counts messages within messages."""

    def __init__(self) -> None:
        self._left = _MOST_PARTS

    def add(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _TooManyParts


def _known_fields(descriptor: Descriptor, data: memoryview) -> Iterator[tuple[FieldDescriptor, memoryview | None]]:
    """Yields the fields of `data` that `descriptor` knows, in the order of the wire, with their raw values; None for
    numbers. Raises DecodeError."""
    place, fields = 0, descriptor.fields_by_number
    while place < len(data):
        tag, place = _varint(data, place)
        kind, value = tag & 7, None
        if kind == _VARINT:
            _, place = _varint(data, place)
        elif kind == _LENGTH_DELIMITED:
            length, place = _varint(data, place)
            value, place = data[place : place + length], place + length
        elif kind in (_FIXED32, _FIXED64):
            place += 4 if kind == _FIXED32 else 8
        else:
            raise DecodeError("groups are not known here")
        if place > len(data):
            raise DecodeError("the bytes end too early")
        if (field := fields.get(tag >> 3)) is not None:
            yield field, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Returns the number at `place` and the place after it."""
    number = 0
    for index, byte in enumerate(data[place : place + _MOST_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, place + index + 1
    raise DecodeError("a number has no end")


def _invalid_strings(descriptor: Descriptor, data: memoryview, prefix: str) -> Iterator[str]:
    num_seen: dict[str, int] = {}
    for field, value in _known_fields(descriptor, data):
        position = num_seen.get(field.name, 0)
        num_seen[field.name] = position + 1
        if value is None:
            continue
        path = f"{prefix}{field.name}[{position}]" if field.is_repeated else f"{prefix}{field.name}"
        if field.message_type is not None:
            yield from _invalid_strings(field.message_type, value, f"{path}.")
        elif field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(value):
            yield path


def _is_utf8(value: memoryview) -> bool:
    try:
        str(value, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _doubly_set_oneofs(
    descriptor: Descriptor, parts: Sequence[memoryview], prefix: str, count: _Count | None
) -> Iterator[str]:
    """Yields the paths of oneofs with two members set. Protobuf would merge `parts` into one message.

    Args:
        count: what counts all messages on the way; None: there cannot be too many.

    Raises:
        DecodeError: the bytes are no message.
        _TooManyParts: there are too many.
    """
    members: dict[str, set[str]] = {}
    messages: dict[str, list[memoryview]] = {}
    for data in parts:
        for field, value in _known_fields(descriptor, data):
            if field.containing_oneof is not None:
                members.setdefault(field.containing_oneof.name, set()).add(field.name)
            if value is None or field.message_type is None:
                continue
            if count is not None:
                count.add()
            elif not _has_oneof(field.message_type):
                continue
            if field.is_repeated:
                yield from _doubly_set_oneofs(field.message_type, [value], f"{prefix}{field.name}.", count)
            else:
                messages.setdefault(field.name, []).append(value)
    yield from (f"{prefix}{name}" for name, fields in members.items() if len(fields) > 1)
    for name, values in messages.items():
        yield from _doubly_set_oneofs(descriptor.fields_by_name[name].message_type, values, f"{prefix}{name}.", count)


@lru_cache
def _has_oneof(descriptor: Descriptor) -> bool:
    """True if the message, or one inside it, has a oneof of several members. `optional` makes a oneof of one."""
    return any(len(oneof.fields) > 1 for oneof in descriptor.oneofs) or any(
        field.message_type is not None and _has_oneof(field.message_type) for field in descriptor.fields
    )
