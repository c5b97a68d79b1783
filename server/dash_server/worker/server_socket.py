"""The worker's end of the connection to its server: blocking, plain or with TLS.

Knows sockets and the handshake; knows no messages.
"""

import select
import socket
import ssl

from dash_server.worker.handshake import ANSWER_BYTES, Credentials, HandshakeError, WorkerHandshake

_READ_BYTES = 1 << 20
_CONNECT_SECONDS = 10.0


class ServerGone(Exception):
    """The server, or the network to it, is gone."""


def connect(host: str, port: int, credentials: Credentials) -> socket.socket:
    """Returns a connection to the server, which has proved that it has the start's secret.

    Raises:
        HandshakeError: this is not the server, or it does not take this worker.
        OSError: it cannot be reached.
    """
    server = socket.create_connection((host, port), _CONNECT_SECONDS)
    try:
        keep_alive(server)
        if credentials.certificate is not None:
            server = _with_tls(server, credentials.certificate)
        handshake = WorkerHandshake(credentials)
        server.sendall(handshake.hello())
        server.sendall(handshake.prove(_receive_exactly(server, ANSWER_BYTES)))
        server.settimeout(None)
    except BaseException:
        server.close()
        raise
    return server


def keep_alive(peer: socket.socket) -> None:
    """Has a TCP socket send small messages at once, and notice within half a minute that its peer's machine is gone."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every system has each of these.
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if (option := getattr(socket, name, None)) is not None:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)


def receive(server: socket.socket, timeout: float | None) -> bytes:
    """Returns what arrives within `timeout` seconds, at most a mebibyte, or nothing; None waits for data.

    Raises:
        ServerGone: the connection has ended.
    """
    is_buffered = isinstance(server, ssl.SSLSocket) and server.pending() > 0
    if not is_buffered and not select.select([server], [], [], timeout)[0]:
        return b""
    try:
        if not isinstance(server, ssl.SSLSocket):
            data = server.recv(_READ_BYTES)
        else:
            # A readable socket may hold half a TLS record, or none of ours: the engine must not wait for the rest.
            server.settimeout(0)
            try:
                data = server.recv(_READ_BYTES)
            except ssl.SSLWantReadError:
                return b""
            finally:
                server.settimeout(None)
    except OSError:
        raise ServerGone from None
    if not data:
        raise ServerGone
    return data


def send(server: socket.socket, data: bytes) -> None:
    """Sends all, and waits while the server takes no more. Raises ServerGone if the connection has ended."""
    try:
        server.sendall(data)
    except OSError:
        raise ServerGone from None


def _with_tls(server: socket.socket, certificate: bytes) -> ssl.SSLSocket:
    """Returns the socket with TLS, if the other end has this certificate, in DER, and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # One certificate is trusted, by its bytes: neither its names nor its authority matter.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    wrapped = context.wrap_socket(server)
    if wrapped.getpeercert(binary_form=True) != certificate:
        wrapped.close()
        raise HandshakeError("the server has another certificate than its start said")
    return wrapped


def _receive_exactly(server: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        data = server.recv(num_bytes - len(received))
        if not data:
            raise HandshakeError("the server closed the connection; its log says why")
        received += data
    return received
