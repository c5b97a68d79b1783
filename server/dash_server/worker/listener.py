"""Takes connections from workers that were started elsewhere, each with the credentials of its start.

Whoever else connects is closed and logged in one line. Knows no messages and no Ray.
"""

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dash_server.worker.connection import FramedConnection
from dash_server.worker.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    Credentials,
    HandshakeError,
    ServerHandshake,
    new_credentials,
    start_id_of,
)
from dash_server.worker.messages import FromWorker, decode_from_worker
from dash_server.worker.server_socket import keep_alive

logger = logging.getLogger(__name__)

_HANDSHAKE_SECONDS = 5.0
# Strangers that say nothing hold a descriptor each until they are closed.
_MAX_HANDSHAKES = 128


@dataclass(frozen=True, slots=True)
class ExpectedWorker:
    """A start whose worker has not connected yet."""

    credentials: Credentials
    connection: "asyncio.Future[FramedConnection[FromWorker]]"


class WorkerListener:
    """A TCP port for workers."""

    def __init__(
        self, host: str, port: int, certificate: tuple[Path, Path] | None, handshake_seconds: float = _HANDSHAKE_SECONDS
    ) -> None:
        """Listens at `host`, an address that workers reach; port 0 is any free one.

        Args:
            certificate: files of a certificate chain and its key, for TLS; read again for each start.

        Raises:
            OSError: the address cannot be used, or the files cannot be read.
        """
        self._certificate = certificate
        self._tls = None if certificate is None else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._certificate_in_der()
        self._handshake_seconds = handshake_seconds
        self._expected: dict[bytes, ExpectedWorker] = {}
        self._handshakes: set[asyncio.Task[None]] = set()
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server(address[:2], family=family)
        self._socket.setblocking(False)
        bound_port = self._socket.getsockname()[1]
        self.address = f"[{host}]:{bound_port}" if ":" in host else f"{host}:{bound_port}"
        """Address that workers connect to, as HOST:PORT."""
        self._accepting = asyncio.create_task(self._accept())

    @contextmanager
    def expect(self) -> Iterator[ExpectedWorker]:
        """Expects one worker inside the block, with credentials of its own.

        Raises:
            OSError: the certificate cannot be read.
        """
        expected = ExpectedWorker(
            new_credentials(self._certificate_in_der()), asyncio.get_running_loop().create_future()
        )
        self._expected[expected.credentials.start_id] = expected
        try:
            yield expected
        except BaseException:
            if expected.connection.done():
                expected.connection.result().abort()
            raise
        finally:
            self._expected.pop(expected.credentials.start_id, None)

    async def close(self) -> None:
        tasks = {self._accepting, *self._handshakes}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._socket.close()

    def _certificate_in_der(self) -> bytes | None:
        if self._tls is None or self._certificate is None:
            return None
        chain, key = self._certificate
        self._tls.load_cert_chain(chain, key)
        begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
        pem = chain.read_text()
        return ssl.PEM_cert_to_DER_cert(pem[pem.index(begin) : pem.index(end) + len(end)])

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, address = await loop.sock_accept(self._socket)
            except OSError as error:  # say, no descriptor is free
                logger.error("a worker's connection cannot be accepted: %s", error.strerror or error)
                await asyncio.sleep(1)
                continue
            if len(self._handshakes) >= _MAX_HANDSHAKES:
                logger.warning("a connection from %s to the workers' port is closed: too many at once", address[0])
                peer.close()
                continue
            handshake = asyncio.create_task(self._greet(peer, address[0]))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _greet(self, peer: socket.socket, address: str) -> None:
        """Hands the connection to the start that expects it, or closes it."""
        writer: asyncio.StreamWriter | None = None
        is_taken = False
        try:
            async with asyncio.timeout(self._handshake_seconds):
                reader, writer = await self._open(peer)
                expected = await self._shake_hands(reader, writer)
            expected.connection.set_result(FramedConnection(writer.transport, decode_from_worker, writer))
            is_taken = True
        except HandshakeError as error:
            reason = str(error)
        except TimeoutError:
            reason = "it did not say who it is in time"
        except ssl.SSLError:
            reason = "its TLS handshake failed"
        except (OSError, asyncio.IncompleteReadError):
            reason = "it closed the connection"
        finally:
            if not is_taken:
                if writer is None:
                    peer.close()
                else:
                    writer.transport.abort()
        if not is_taken:
            logger.warning("a connection from %s to the workers' port is closed: %s", address, reason)

    async def _open(self, peer: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        keep_alive(peer)
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, peer, ssl=self._tls)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> ExpectedWorker:
        hello = await reader.readexactly(HELLO_BYTES)
        expected = self._expected.get(start_id_of(hello))
        if expected is None:
            raise HandshakeError("it names a start that is over, or never was")
        handshake = ServerHandshake(expected.credentials, hello)
        writer.write(handshake.answer())
        handshake.check(await reader.readexactly(PROOF_BYTES))
        if expected.connection.done():
            raise HandshakeError("the worker of this start is connected already")
        return expected


def is_loopback(host: str) -> bool:
    """True if only this machine reaches the host. Raises OSError if there is no such host."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
