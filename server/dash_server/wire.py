"""Parses request bytes. Errors name the field that does not parse.

grpc.aio fails a call with UNKNOWN if its deserialiser raises. So handlers take the bytes and parse them here. Knows the
protobuf wire format, and no field's meaning.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from dash_runtime.errors import InvalidRequest

_LENGTH_DELIMITED = 2

M = TypeVar("M", bound=Message)


def parse(message_class: type[M], data: bytes) -> M:
    """Parses the message in `data`.

    Raises:
        InvalidRequest: the bytes are not such a message, a string is not UTF-8, or two members of one oneof are set
            (protobuf itself would silently keep the last).
    """
    descriptor = message_class.DESCRIPTOR
    try:
        message = message_class.FromString(data)
        path = next(_doubly_set_oneofs(descriptor, [data], ""), None)
    except DecodeError:
        raise _parse_error(descriptor, data) from None
    if path is not None:
        raise InvalidRequest(path, "must be set only once, but two of its members are set")
    return message


def _parse_error(descriptor: Descriptor, data: bytes) -> InvalidRequest:
    try:
        path = next(_invalid_strings(descriptor, data, ""), None)
    except DecodeError:
        path = None
    if path is not None:
        return InvalidRequest(path, "is not valid UTF-8")
    return InvalidRequest("request", f"the bytes are not a {descriptor.full_name}")


def _known_fields(descriptor: Descriptor, data: bytes) -> Iterator[tuple[FieldDescriptor, object]]:
    """Yields the fields of `data` that `descriptor` knows, in the order of the wire, with their raw values."""
    for unknown in UnknownFieldSet(Empty.FromString(data)):
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is not None:
            yield field, (unknown.data if unknown.wire_type == _LENGTH_DELIMITED else None)


def _invalid_strings(descriptor: Descriptor, data: bytes, prefix: str) -> Iterator[str]:
    num_seen: dict[str, int] = {}
    for field, value in _known_fields(descriptor, data):
        position = num_seen.get(field.name, 0)
        num_seen[field.name] = position + 1
        if not isinstance(value, bytes):
            continue
        path = f"{prefix}{field.name}[{position}]" if field.is_repeated else f"{prefix}{field.name}"
        if field.message_type is not None:
            yield from _invalid_strings(field.message_type, value, f"{path}.")
        elif field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(value):
            yield path


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _doubly_set_oneofs(descriptor: Descriptor, parts: list[bytes], prefix: str) -> Iterator[str]:
    """Yields the paths of oneofs with two members set. Protobuf would merge `parts` into one message."""
    members: dict[str, set[str]] = {}
    messages: dict[FieldDescriptor, list[bytes]] = {}
    for data in parts:
        for field, value in _known_fields(descriptor, data):
            if field.containing_oneof is not None:
                members.setdefault(field.containing_oneof.name, set()).add(field.name)
            if isinstance(value, bytes) and field.message_type and _has_oneof(field.message_type):
                messages.setdefault(field, []).append(value)
    yield from (f"{prefix}{name}" for name, fields in members.items() if len(fields) > 1)
    for field, values in messages.items():
        yield from _doubly_set_oneofs(field.message_type, values, f"{prefix}{field.name}.")


@lru_cache
def _has_oneof(descriptor: Descriptor) -> bool:
    """True if the message, or one inside it, has a oneof of several members. `optional` makes a oneof of one."""
    return any(len(oneof.fields) > 1 for oneof in descriptor.oneofs) or any(
        field.message_type is not None and _has_oneof(field.message_type) for field in descriptor.fields
    )
