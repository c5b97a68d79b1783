"""The exceptions of the client. Each message says what went wrong and, where it can, what to do.

DashError
├── InvalidArgumentError     the request is wrong (also a ValueError); see `field_violations`
├── UnauthenticatedError     the server wants a token, or does not know this one
├── NotFoundError            nothing has that name
├── ResourceExhaustedError   the server is full; see `retry_after_seconds`
├── UnavailableError         no server there, or it is not ready
├── DeadlineExceededError    the timeout passed first
├── CancelledError           the call was cancelled
├── UnimplementedError       the server does not know this method
└── ServerError              the server failed, or answered with what this client cannot read
"""

from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field of a request; `field` is a dotted path."""

    field: str
    description: str


class DashError(Exception):
    """Anything that a call can fail with.

    Attributes:
        message: what went wrong, in words.
        code: the name of the gRPC status, such as "INVALID_ARGUMENT".
        reason: the server's constant for the cause, if it gave one.
        request_id: the server's name for the request, if it got that far.
        field_violations: what is wrong with which field of the request.
        retry_after_seconds: how long to wait before trying again, if the server said.
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
        # An exception is remade from its message alone, which would not do when one comes from another process.
        keywords = {name: value for name, value in self.__dict__.items() if name != "message"}
        return partial(type(self), self.message, **keywords), ()


class InvalidArgumentError(DashError, ValueError):
    """The request is wrong; sending it again will not help."""


class UnauthenticatedError(DashError):
    """The server wants to know who calls, and no token was sent or nobody has that one."""


class NotFoundError(DashError):
    """Nothing has that name."""


class ResourceExhaustedError(DashError):
    """The server has no room for the request now."""


class UnavailableError(DashError):
    """There is no server at the target, or it is not ready."""


class DeadlineExceededError(DashError):
    """The timeout passed before the answer was complete."""


class CancelledError(DashError):
    """The call was cancelled, by this side or the other."""


class UnimplementedError(DashError):
    """The server does not know this method."""


class ServerError(DashError):
    """The server failed, or answered with what this client cannot read."""


def invalid_argument(field: str, description: str) -> InvalidArgumentError:
    """For a value that cannot even be sent; `field` is the name of the argument."""
    return InvalidArgumentError(
        f"{field}: {description}",
        code="INVALID_ARGUMENT",
        field_violations=(FieldViolation(field, description),),
    )
