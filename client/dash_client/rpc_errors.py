"""Turns a failed RPC into an exception of `errors`. Shared by the sync and the async client."""

import contextlib
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from dash_client import errors
from dash_client.channel import Target
from dash_client.errors import DashError, FieldViolation

DETAILS_KEY = "grpc-status-details-bin"

_ERRORS: dict[grpc.StatusCode, type[DashError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: errors.CancelledError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnimplementedError,
}

_NO_SERVER = "no server at {target}: start one with `make serve`, or name another with DASH_TARGET or `target`"
_NO_TLS = "the server at {target} does not speak TLS: connect without `tls` and without certificate files"

# gRPC core has no codes for the causes of a failed connection, so match its words. The first match wins.
_CONNECTION_TROUBLE = (
    ("certificate_verify_failed", "no known authority signed the certificate of {target}: give its own as `ca_file`"),
    ("hostname verification", "the certificate of {target} is for another name: give that as `server_name`"),
    ("no match found for server name", "the certificate of {target} is for another name: give that as `server_name`"),
    ("wrong_version_number", _NO_TLS),
    ("http1.x server", "what answers at {target} speaks HTTP/1 and not gRPC: name the server itself, not a proxy"),
    ("expected settings frame", "what answers at {target} does not speak gRPC: name a dash server"),
    ("proxy", "the proxy before {target} does not let gRPC through (set no_proxy to go without it): {text}"),
    ("errors resolving", "the name in {target} is not known here: {text}"),
    ("failed to connect", _NO_SERVER),
    ("connect failed", _NO_SERVER),
)
_NEVER_CONNECTED = ("connections to all backends failing", "failed to connect to all addresses", "errors resolving")
_HUNG_UP = (
    "what answers at {target} hangs up: if it speaks TLS, connect with `tls=True` or `ca_file`; if it wants "
    "certificates, with `certificate_file` and `key_file` of an authority that it knows; else it is no dash server"
)


def error_from_rpc(
    error: grpc.RpcError, *, target: Target, timeout: float | None, request_id: str | None = None
) -> DashError:
    """Returns the exception for a failed call.

    Args:
        error: gRPC's exception, which is also a `grpc.Call`, in grpcio and in grpc.aio.
        target: the server that was called, for the message.
        timeout: the call's deadline in seconds, for the message.
        request_id: the server's id of the request, if the call got one.
    """
    call: Any = error
    code: grpc.StatusCode = call.code()
    text: str = call.details() or ""
    details = rich_details(call.trailing_metadata())
    info = details.get("ErrorInfo") or error_details_pb2.ErrorInfo()
    bad_request = details.get("BadRequest") or error_details_pb2.BadRequest()
    request_info = details.get("RequestInfo") or error_details_pb2.RequestInfo()
    violations = tuple(FieldViolation(wrong.field, wrong.description) for wrong in bad_request.field_violations)
    has_begun = request_id is not None
    request_id = request_info.request_id or info.metadata.get("request_id") or request_id
    if details:
        missing = [f"{v.field}: {v.description}" for v in violations if v.description not in text]
        message = "; ".join([text or code.name, *missing])
    else:
        message = _message(code, text, has_begun=has_begun, target=target, timeout=timeout)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        message += " (the token is `token`, or DASH_TOKEN)"
    return _ERRORS.get(code, errors.ServerError)(
        message,
        code=code.name,
        reason=info.reason or None,
        request_id=request_id,
        field_violations=violations,
        retry_after_seconds=retry_seconds(details),
    )


def rich_details(metadata: Any) -> dict[str, Any]:
    """Returns the google.rpc details in a call's trailing metadata, by type name."""
    found: dict[str, Any] = {}
    for key, value in metadata or ():
        if key == DETAILS_KEY:
            with contextlib.suppress(DecodeError):
                for packed in status_pb2.Status.FromString(value).details:
                    package, _, name = packed.TypeName().rpartition(".")
                    if package == "google.rpc" and hasattr(error_details_pb2, name):
                        found[name] = getattr(error_details_pb2, name).FromString(packed.value)
    return found


def retry_seconds(details: dict[str, Any]) -> float | None:
    """Returns the seconds after which the server asks to be tried again; None if it does not say."""
    retry = details.get("RetryInfo")
    return retry.retry_delay.ToTimedelta().total_seconds() if retry else None


def _message(code: grpc.StatusCode, text: str, *, has_begun: bool, target: Target, timeout: float | None) -> str:
    """Returns the message for a status without details: gRPC's own, or one of another kind of server."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        within = f" within {timeout:g} s" if timeout is not None else " in time"
        return f"{target.name} did not complete its answer{within}: raise the timeout or ask for fewer tokens"
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(text, has_begun, target)
    if code is grpc.StatusCode.CANCELLED:
        return "the call was cancelled"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"{target.name} does not know this method ({text}): is it a dash server of this version?"
    return text or code.name


def _unavailable(text: str, has_begun: bool, target: Target) -> str:
    words, name = text.lower(), target.name
    if has_begun:
        return f"the connection to {name} was lost in the middle of the answer ({text}): ask again, from the start"
    if not any(known in words for known in _NEVER_CONNECTED):
        return f"the connection to {name} failed: {text}"
    message = next((message for known, message in _CONNECTION_TROUBLE if known in words), None)
    is_closed = "socket closed" in words or "connection reset" in words
    if (message is None and is_closed) or (message is _NO_SERVER and target.is_listening()):
        message = _HUNG_UP
    return (message or "no connection to {target}: {text}").format(target=name, text=text)
