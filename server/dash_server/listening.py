"""Opens the server's port: address, TLS and connection limits.

Knows sockets, certificates and gRPC's options; knows no services and no requests.
"""

import contextlib
import ipaddress
import logging
import os
import resource
import socket
import ssl
from pathlib import Path

import grpc

from dash_server.settings import Settings
from dash_server.watched_files import WatchedFiles

logger = logging.getLogger(__name__)

_UNREAD_BYTES = 16 * 1024
_MOST_FILES = 65_536
_OWN_FILES = 256
"""Files that the server has open besides connections, and some to spare."""


class ListenError(Exception):
    """The settings do not let the server listen. The message is one sentence for the user."""


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """Returns the gRPC server's options."""
    age = settings.max_connection_age_seconds
    return [
        *([] if age is None else [("grpc.max_connection_age_ms", int(age * 1000))]),
        # Otherwise a second server on the same port would silently share it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.max_concurrent_streams", settings.max_calls_per_connection),
        ("grpc.max_allowed_incoming_connections", min(settings.max_connections, most_connections())),
        ("grpc.max_connection_idle_ms", int(settings.max_connection_idle_seconds * 1000)),
        # By default a caller may take two minutes for TLS and the first frames.
        ("grpc.server_handshake_timeout_ms", 10_000),
        # What a call may send before anybody reads it. gRPC would let this grow with the connection's speed.
        ("grpc.http2.lookahead_bytes", _UNREAD_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.enable_channelz", int(settings.channelz)),
        # Lets clients ping every 10 s, also without calls, to keep a connection alive through a long wait.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 3),
        ("grpc.keepalive_permit_without_calls", 1),
        # A caller whose machine vanished frees its slot within a minute.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def raise_file_limit() -> None:
    """Lets this process have as many files open as it may, up to a limit that nobody needs to exceed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Returns the number of connections for which this process has file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(1, files - min(_OWN_FILES, files // 2))


def listen(server: grpc.aio.Server, settings: Settings) -> int:
    """Binds the server to its address and returns the port.

    Raises:
        ListenError: the address is in use or not this machine's; or other machines reach it and there is no TLS; or
            the certificate cannot be used.
    """
    host, port = settings.host, settings.port
    credentials = None
    if settings.tls_certificate_file is not None and settings.tls_key_file is not None:
        certificates = _Certificates(settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file)
        credentials = certificates.credentials()
    try:
        addresses = try_to_bind(host, port)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
    if credentials is None and not settings.allow_plaintext and not all(map(is_loopback, addresses)):
        raise ListenError(
            f"DASH_HOST: other machines reach {host}, and without TLS everybody on the way reads along; set "
            "DASH_TLS_CERTIFICATE_FILE and DASH_TLS_KEY_FILE, or DASH_ALLOW_PLAINTEXT=true"
        )
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {host}, port {port}: {error}") from None


def write_port_file(path: Path, port: int) -> None:
    """Writes the port atomically.

    Raises:
        ListenError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f"{port}\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ListenError(f"DASH_PORT_FILE: {path} cannot be written: {error.strerror or error}") from None


def try_to_bind(host: str, port: int) -> list[str]:
    """Binds a socket to each address of the host, closes it, and returns the addresses.

    gRPC's own attempt would log lines of its own and raise a RuntimeError without the reason.

    Raises:
        OSError: an address cannot be bound.
    """
    addresses = []
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        addresses.append(str(address[0]))
    return addresses


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Certificates:
    """The certificate files. A new connection reads them again if they have changed.

    A new pair that does not match (say one file of the two was replaced) is reported once, and the old pair stays.
    """

    def __init__(self, certificate_file: Path, key_file: Path, client_ca_file: Path | None) -> None:
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._client_ca_file = client_ca_file
        self._files = WatchedFiles(certificate_file, key_file, client_ca_file)
        self._first = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """Returns credentials for gRPC's secure port. A client CA must have signed each client's certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._first, self._changed, require_client_authentication=self._client_ca_file is not None
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns new certificates; None if the old ones stay. gRPC calls it in a thread for each new connection; it
        must not raise.

        For certificates that it is given, even the same, gRPC makes its TLS anew. If that happens with each connection,
        it counts its references wrongly when handshakes are given up, and aborts (seen with grpcio 1.85.3).
        """
        if not self._files.have_changed():
            return None
        try:
            changed = self._load()
        except ListenError as error:
            logger.error("the certificate stays as it was: %s", error)
            return None
        logger.info("the certificate was read again from %s", self._certificate_file)
        return changed

    def _load(self) -> grpc.ServerCertificateConfiguration:
        try:
            # gRPC would accept any bytes and fail each handshake later.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate_file, self._key_file, password=_no_password)
            if self._client_ca_file is not None:
                context.load_verify_locations(self._client_ca_file)
            pair = self._key_file.read_bytes(), self._certificate_file.read_bytes()
            authorities = None if self._client_ca_file is None else self._client_ca_file.read_bytes()
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            also = "" if self._client_ca_file is None else f", with the authorities in {self._client_ca_file}"
            raise ListenError(
                f"DASH_TLS_CERTIFICATE_FILE, DASH_TLS_KEY_FILE: {self._certificate_file} and {self._key_file} are not "
                f"a certificate and its key in PEM{also}: {reason}"
            ) from None
        return grpc.ssl_server_certificate_configuration([pair], authorities)


def _no_password() -> str:
    """Raises an error instead of asking on the terminal for an encrypted key's password."""
    raise ValueError("the key is encrypted, and nobody is there to type a password")
