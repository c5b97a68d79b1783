"""Turns a failed RPC into an exception of `errors`. Shared by the sync and the async client."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from dash_client import errors
from dash_client.errors import DashError, FieldViolation

_DETAILS_KEY = "grpc-status-details-bin"

_ERRORS: dict[grpc.StatusCode, type[DashError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: errors.CancelledError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnimplementedError,
}

# gRPC core's own words for a connection that was never made; there is no code for it.
_NEVER_CONNECTED = ("failed to connect", "dns resolution failed", "errors resolving")


def error_from_rpc(
    error: grpc.RpcError, *, target: str, timeout: float | None, request_id: str | None = None
) -> DashError:
    """The exception for a failed call.

    Args:
        error: what gRPC raised; also a call (`grpc.Call`), in grpcio and grpc.aio alike.
        target: where the call went, for the message.
        timeout: the call's deadline in seconds, for the message.
        request_id: the server's name for the request, where the call got that far.
    """
    call: Any = error
    code: grpc.StatusCode = call.code()
    text: str = call.details() or ""
    details = _rich_details(call.trailing_metadata())
    info = details.get("ErrorInfo")
    bad_request = details.get("BadRequest")
    retry = details.get("RetryInfo")
    request_info = details.get("RequestInfo")
    violations = tuple(
        FieldViolation(violation.field, violation.description)
        for violation in (bad_request.field_violations if bad_request else ())
    )
    if request_info is not None:
        request_id = request_info.request_id or request_id
    elif info is not None:
        request_id = info.metadata.get("request_id") or request_id
    message = _message(code, text, said_by_server=bool(details), violations=violations, target=target, timeout=timeout)
    return _ERRORS.get(code, errors.ServerError)(
        message,
        code=code.name,
        reason=info.reason if info else None,
        request_id=request_id,
        field_violations=violations,
        retry_after_seconds=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


def _rich_details(metadata: Any) -> dict[str, Any]:
    """The google.rpc details in a call's trailing metadata, by the name of their type."""
    found: dict[str, Any] = {}
    for key, value in metadata or ():
        if key != _DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for packed in status.details:
                name = packed.TypeName().removeprefix("google.rpc.")
                kind = getattr(error_details_pb2, name, None)
                if kind is not None and packed.TypeName().startswith("google.rpc."):
                    found[name] = kind.FromString(packed.value)
        except DecodeError:
            continue
    return found


def _message(
    code: grpc.StatusCode,
    text: str,
    *,
    said_by_server: bool,
    violations: tuple[FieldViolation, ...],
    target: str,
    timeout: float | None,
) -> str:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not said_by_server:
        within = f" within {timeout:g} s" if timeout is not None else " in time"
        return f"{target} did not complete its answer{within}: raise the timeout or ask for fewer tokens"
    if code is grpc.StatusCode.UNAVAILABLE and not said_by_server:
        if any(words in text.lower() for words in _NEVER_CONNECTED):
            return f"no server at {target}: start one with `make serve`, or name another with DASH_TARGET or `target`"
        return f"the connection to {target} failed: {text}"
    if code is grpc.StatusCode.CANCELLED and not said_by_server:
        return "the call was cancelled"
    if code is grpc.StatusCode.UNIMPLEMENTED and not said_by_server:
        return f"{target} does not know this method ({text}): is it a dash server of this version?"
    missing = [f"{v.field}: {v.description}" for v in violations if v.description not in text]
    return "; ".join([text or code.name, *missing])
