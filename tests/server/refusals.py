"""How calls fail: the status, with its google.rpc details by type name."""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Refusal:
    code: grpc.StatusCode
    message: str
    details: dict[str, Any]
    trailers: dict[str, Any]

    @property
    def fields(self) -> list[str]:
        """The fields that are wrong."""
        return [violation.field for violation in self.details["BadRequest"].field_violations]

    @property
    def reason(self) -> str:
        return str(self.details["ErrorInfo"].reason)


def details_of(status: bytes) -> dict[str, Any]:
    """Returns the details of a packed google.rpc.Status."""
    details = {}
    for packed in status_pb2.Status.FromString(status).details:
        name = packed.TypeName().rpartition(".")[2]
        details[name] = getattr(error_details_pb2, name).FromString(packed.value)
    return details


async def refusal(call: Awaitable[Any] | grpc.aio.UnaryStreamCall) -> Refusal:
    """Waits for a call, or for the end of a stream, that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await (read(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    error = failure.value
    trailers = dict(error.trailing_metadata() or ())
    details = details_of(trailers.get("grpc-status-details-bin", b""))
    return Refusal(error.code(), error.details() or "", details, trailers)


async def read(call: grpc.aio.UnaryStreamCall) -> None:
    """Reads a stream to its end."""
    async for _ in call:
        pass
