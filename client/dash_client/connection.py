"""The settings of a connection: target, TLS, token, and the metadata of each call. Shared by both clients.

Knows no calls and no messages. No representation and no error contains a secret.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import grpc

from dash_client import checks
from dash_client.channel import Target, channel_options, resolve_retries, resolve_target
from dash_client.errors import invalid_argument

Metadata = tuple[tuple[str, str], ...]
PemFile = str | os.PathLike[str] | bytes

TRACE_KEYS = ("traceparent", "tracestate")
"""The keys of a caller's span, as W3C Trace Context names them."""

_TOKEN = re.compile(r"[\x21-\x7e]+")


class ConnectionOptions(TypedDict, total=False):
    """The keyword arguments of `DashClient` and `AsyncDashClient`, besides `target` and `timeout`."""

    token: str | Callable[[], str] | None
    """Bearer token, or a function that returns it, called for each call (it must not block the async client).
    Unset: DASH_TOKEN."""
    allow_insecure_token: bool
    """Send a token without TLS to another machine, if something else protects the connection. Unset: refused."""
    tls: bool | None
    """Encrypt the connection. Unset: only if one of `ca_file`, `certificate_file` and `server_name` is given."""
    ca_file: str | os.PathLike[str] | bytes | None
    """Authorities that may sign the server's certificate, in PEM: a path, or the contents. Unset: gRPC's own list."""
    certificate_file: str | os.PathLike[str] | bytes | None
    """This client's certificate chain for mutual TLS, in PEM: a path, or the contents."""
    key_file: str | os.PathLike[str] | bytes | None
    """The certificate's private key, in PEM: a path, or the contents."""
    server_name: str | None
    """The name in the server's certificate, if it is not the target's."""
    retries: bool | int
    """Number of retries of a call that the server has not begun, 0 to 4. Unset or True: 3; False: 0."""


@dataclass(frozen=True, slots=True)
class Connection:
    """The checked settings of a connection."""

    target: Target
    is_encrypted: bool
    retries: int
    options: tuple[tuple[str, int | str], ...]
    _credentials: Any = field(repr=False)
    _token: str | Callable[[], str] | None = field(repr=False)

    def open(self, channels: Any) -> Any:
        """Opens a channel; `channels` is `grpc` or `grpc.aio`."""
        if self._credentials is None:
            return channels.insecure_channel(self.target.address, options=self.options)
        return channels.secure_channel(self.target.address, self._credentials, options=self.options)

    def metadata(self) -> Metadata:
        """Returns the metadata of one call: the token, and the trace that the call is part of.

        Raises:
            InvalidArgumentError: the token function returned no token. Its own exceptions are passed on.
        """
        token = self._token() if callable(self._token) else self._token
        if token is None and self._token is None:
            return _trace_context()
        return (("authorization", f"Bearer {_checked_token(token)}"), *_trace_context())


def connection(target: str | None, **options: Unpack[ConnectionOptions]) -> Connection:
    """Checks the options as far as possible without the network.

    Raises:
        InvalidArgumentError: an argument cannot be used; the message names it.
        TypeError: there is no such option.
    """
    checks.require_known(options, ConnectionOptions)
    resolved = resolve_target(target)
    server_name = options.get("server_name")
    if server_name is not None:
        checks.text("server_name", server_name)
    credentials = _credentials(options)
    token = _resolve_token(options.get("token"))
    allowed = checks.flag("allow_insecure_token", options.get("allow_insecure_token", False))
    if token is not None and credentials is None and not resolved.is_on_this_machine and not allowed:
        raise invalid_argument(
            "token",
            f"everybody on the way to {resolved.name} could read it: connect with tls=True or ca_file, or, where "
            "something else protects it, with allow_insecure_token=True",
        )
    retries = resolve_retries(options.get("retries", True))
    return Connection(
        target=resolved,
        is_encrypted=credentials is not None,
        retries=retries,
        options=tuple(channel_options(resolved, retries, server_name)),
        _credentials=credentials,
        _token=token,
    )


def _credentials(options: ConnectionOptions) -> Any:
    """Returns gRPC's credentials, or None without TLS."""
    certificate_authorities = _pem("ca_file", options.get("ca_file"))
    certificate = _pem("certificate_file", options.get("certificate_file"))
    key = _pem("key_file", options.get("key_file"))
    if (certificate is None) != (key is None):
        given, missing = ("key_file", "certificate_file") if certificate is None else ("certificate_file", "key_file")
        raise invalid_argument(missing, f"is needed where {given} is given")
    needs_tls = next((name for name in ("ca_file", "certificate_file", "server_name") if options.get(name)), None)
    tls = options.get("tls")
    if tls is not None:
        checks.flag("tls", tls)
    if tls is False and needs_tls is not None:
        raise invalid_argument("tls", f"cannot be False where {needs_tls} is given")
    if not (tls or needs_tls):
        return None
    return grpc.ssl_channel_credentials(certificate_authorities, key, certificate)


def _pem(argument: str, given: PemFile | None) -> bytes | None:
    """Returns the contents. Checked here, since gRPC takes any bytes and then fails each handshake."""
    if given is None:
        return None
    if isinstance(given, bytes):
        contents, where = given, "it"
    elif isinstance(given, (str, os.PathLike)):
        where = os.fspath(given)
        try:
            contents = Path(given).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise invalid_argument(argument, f"{where} cannot be read: {reason}") from None
    else:
        raise invalid_argument(argument, f"must be a path, or bytes in PEM, not {type(given).__name__}")
    if b"-----BEGIN " not in contents:
        raise invalid_argument(argument, f"{where} is not in PEM (-----BEGIN …)")
    return contents


def _resolve_token(token: str | Callable[[], str] | None) -> str | Callable[[], str] | None:
    if token is None:
        found = os.environ.get("DASH_TOKEN", "").strip()
        return _checked_token(found, "DASH_TOKEN") if found else None
    return token if callable(token) else _checked_token(token)


def _checked_token(token: Any, source: str = "token") -> str:
    # gRPC would quote an invalid token in its error.
    if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
        raise invalid_argument("token", f"{source} must be printable ASCII without spaces")
    return token


def _trace_context() -> Metadata:
    """Returns the caller's span as metadata, so that the server's spans are below it.

    Only if the program already imported OpenTelemetry: else there is no span, and the import costs time.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate, trace

    if not trace.get_current_span().get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
