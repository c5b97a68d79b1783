"""The exceptions of the client. Each message says what went wrong and, if possible, what to do.

DashError
├── InvalidArgumentError     the request is wrong (also a ValueError); see `field_violations`
├── UnauthenticatedError     the server requires a token, or rejects this one
├── NotFoundError            nothing has that name
├── ResourceExhaustedError   the server is full; see `retry_after_seconds`
├── UnavailableError         no server at the target, or it is not ready
├── DeadlineExceededError    the timeout passed first
├── CancelledError           the call was cancelled
├── UnimplementedError       the server does not know this method
└── ServerError              the server failed, or sent an unreadable answer
"""

from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field of a request; `field` is a dotted path."""

    field: str
    description: str


class DashError(Exception):
    """The base class of all errors of this client.

    Attributes:
        message: a description for a person.
        code: the name of the gRPC status, such as "INVALID_ARGUMENT".
        reason: the server's constant for the cause, if it sent one.
        request_id: the server's id of the request, if it got one.
        field_violations: the invalid fields of the request.
        retry_after_seconds: the delay before a retry that the server asks for, if any.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str | None = None,
        request_id: str | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.field_violations = field_violations
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        # By default pickle rebuilds an exception from its message alone, which loses the other attributes.
        keywords = {name: value for name, value in self.__dict__.items() if name != "message"}
        return partial(type(self), self.message, **keywords), ()


class InvalidArgumentError(DashError, ValueError):
    """The request is wrong; a retry will not help."""


class UnauthenticatedError(DashError):
    """The server requires a token, and none or an unknown one was sent."""


class NotFoundError(DashError):
    """Nothing has that name."""


class ResourceExhaustedError(DashError):
    """The server has no room for the request now."""


class UnavailableError(DashError):
    """There is no server at the target, or it is not ready."""


class DeadlineExceededError(DashError):
    """The timeout passed before the answer was complete."""


class CancelledError(DashError):
    """The call was cancelled, by the client or the server."""


class UnimplementedError(DashError):
    """The server does not know this method."""


class ServerError(DashError):
    """The server failed, or sent an answer that this client cannot read."""


def invalid_argument(field: str, description: str) -> InvalidArgumentError:
    """Returns the error for a value that cannot be sent; `field` is the name of the argument."""
    return InvalidArgumentError(
        f"{field}: {description}",
        code="INVALID_ARGUMENT",
        field_violations=(FieldViolation(field, description),),
    )
