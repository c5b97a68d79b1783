"""Turns exceptions into the gRPC statuses that callers get, with google.rpc details.

Knows no request and no servicer. An unexpected exception becomes INTERNAL with the request's id, and callers learn no
more of it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from dash_runtime.errors import InvalidRequest

ERROR_DOMAIN = "dash-llm"
RETRY_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_DETAILS_KEY = "grpc-status-details-bin"

# gRPC peers refuse trailers over about 8 KiB, so long values from callers are cut.
_MAX_VIOLATIONS = 8
_MAX_TEXT_BYTES = 240


class InvalidFields(Exception):
    """Several fields of a request are wrong. `violations` is not empty."""

    def __init__(self, violations: Iterable[InvalidRequest]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(str(violation) for violation in self.violations))


@contextmanager
def below(prefix: str) -> Iterator[None]:
    """Prefixes the paths of fields that are found wrong inside the block."""
    try:
        yield
    except InvalidRequest as error:
        raise below_field(prefix, error) from error
    except InvalidFields as error:
        raise InvalidFields(below_field(prefix, violation) for violation in error.violations) from error


def below_field(prefix: str, error: InvalidRequest) -> InvalidRequest:
    """Returns the error with the path of its field prefixed."""
    return InvalidRequest(f"{prefix}.{error.field}", error.description)


class ServiceError(Exception):
    """A refusal of a valid request. `reason` is the ErrorInfo's, in capitals."""

    code: grpc.StatusCode
    reason: str
    retry_after_seconds: float | None = None


class QueueFull(ServiceError):
    """The server holds as many requests or tokens as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(self, num_inside: int, retry_after_seconds: float) -> None:
        super().__init__(f"the server holds {num_inside} requests and has no room for this one; try again later")
        self.retry_after_seconds = retry_after_seconds


class CallerLimitReached(ServiceError):
    """This caller has as many requests or tokens inside as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "CALLER_LIMIT"

    def __init__(self, limit: str, retry_after_seconds: float) -> None:
        super().__init__(f"this caller may have {limit}; wait for some of its requests to end")
        self.retry_after_seconds = retry_after_seconds


class DeadlineTooShort(ServiceError):
    """The request could not be served before its deadline, so it was not started."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_TOO_SHORT"

    def __init__(self, least_seconds: float, seconds_left: float) -> None:
        super().__init__(
            f"the deadline is {max(seconds_left, 0):.3f} s away and this would take {least_seconds:.3f} s at least, "
            "as fast as the server is at present"
        )


class DecisionsNotFound(ServiceError):
    """The request's decisions are not kept, or belong to another caller. The message does not say which."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "DECISIONS_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("nothing recorded is held of a request of this caller with this id; only the latest are kept")


class AuditNotFound(ServiceError):
    """There is nothing to audit, or it belongs to another caller. The message does not say which."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "AUDIT_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__(
            "no ADAPTIVE answer of two tokens or more, by this id and of this caller, is among the latest, which are "
            "kept for audits"
        )


class Unauthenticated(ServiceError):
    """The call needs a valid bearer token."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class MessageTooSlow(ServiceError):
    """The request's message took too long to arrive."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_SLOW"
    retry_after_seconds = 1.0

    def __init__(self) -> None:
        super().__init__("the request's message took too long to arrive; send it again, in one piece")


class ShuttingDown(ServiceError):
    """The server is shutting down."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "SHUTTING_DOWN"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class SessionClosing(ServiceError):
    """This session takes no more generations, because its connection is old; a new one does."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "SESSION_CLOSING"

    def __init__(self) -> None:
        super().__init__("this session takes no more generations; open another")


class WorkerUnavailable(ServiceError):
    """No worker is ready, or the one that had the request died."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "WORKER_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Failure:
    """A status that is ready to be sent."""

    code: grpc.StatusCode
    reason: str
    """The ErrorInfo's reason."""
    message: str
    details: bytes
    """The google.rpc.Status, serialised."""
    more_metadata: tuple[tuple[str, str], ...] = ()

    @property
    def is_internal(self) -> bool:
        return self.code is grpc.StatusCode.INTERNAL

    @property
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return ((_DETAILS_KEY, self.details), *self.more_metadata)


def failure_of(error: Exception, request_id: str) -> Failure:
    """Returns the status that tells a caller of `error`."""
    if isinstance(error, InvalidRequest):
        return _invalid_argument((error,), request_id)
    if isinstance(error, InvalidFields):
        return _invalid_argument(error.violations, request_id)
    if not isinstance(error, ServiceError):
        message = f"internal error in request {request_id}; the server's log has more"
        return _failure(grpc.StatusCode.INTERNAL, "INTERNAL", message, request_id)
    details: list[Message] = []
    pushback: tuple[tuple[str, str], ...] = ()
    if error.retry_after_seconds is not None:
        # gRPC's own clients may hang on a push-back of 0.
        milliseconds = max(1, round(error.retry_after_seconds * 1000))
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(milliseconds)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        pushback = ((RETRY_PUSHBACK_KEY, str(milliseconds)),)
    return _failure(error.code, error.reason, str(error), request_id, details, pushback)


def _invalid_argument(violations: tuple[InvalidRequest, ...], request_id: str) -> Failure:
    shown = violations[:_MAX_VIOLATIONS]
    bad_request = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_shorten(violation.field), description=_shorten(violation.description)
            )
            for violation in shown
        ]
    )
    message = f"{_shorten(shown[0].field)}: {_shorten(shown[0].description)}"
    if len(violations) > 1:
        message += f" (and {len(violations) - 1} more)"
    return _failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", message, request_id, [bad_request])


def _failure(
    code: grpc.StatusCode,
    reason: str,
    message: str,
    request_id: str,
    details: Iterable[Message] = (),
    metadata: tuple[tuple[str, str], ...] = (),
) -> Failure:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata={"request_id": request_id})
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in (info, *details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return Failure(code, reason, message, status.SerializeToString(), metadata)


def _shorten(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= _MAX_TEXT_BYTES:
        return text
    return encoded[:_MAX_TEXT_BYTES].decode(errors="ignore") + "…"
