"""The handshake on a connection between a worker and its server, before any message.

Both prove that they have the start's secret, by HMAC-SHA256 over fresh nonces, and never send it:

    worker: magic, start id, worker's nonce
    server: server's nonce, HMAC(secret, "server", start id, worker's nonce, server's nonce)
    worker: HMAC(secret, "worker", start id, worker's nonce, server's nonce)

Knows bytes; knows no sockets.
"""

import hmac
import secrets

import msgspec

_MAGIC = b"dash-worker/1 "
_ID_BYTES = 16
_NONCE_BYTES = 32
_PROOF_BYTES = 32
HELLO_BYTES = len(_MAGIC) + _ID_BYTES + _NONCE_BYTES
ANSWER_BYTES = _NONCE_BYTES + _PROOF_BYTES
PROOF_BYTES = _PROOF_BYTES


class HandshakeError(Exception):
    """The other end is not who it should be. The message has nothing that the other end sent."""


class Credentials(msgspec.Struct, frozen=True):
    """Proof of identity of a worker process that connects. It is good for one start of one worker."""

    start_id: bytes
    """Names the start. Not secret."""
    secret: bytes
    certificate: bytes | None = None
    """The server's certificate in DER, if the connection uses TLS."""

    def __repr__(self) -> str:
        return "Credentials(…)"


def new_credentials(certificate: bytes | None = None) -> Credentials:
    return Credentials(secrets.token_bytes(_ID_BYTES), secrets.token_bytes(32), certificate)


class WorkerHandshake:
    """The worker's part."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._nonce = secrets.token_bytes(_NONCE_BYTES)

    def hello(self) -> bytes:
        return _MAGIC + self._credentials.start_id + self._nonce

    def prove(self, answer: bytes) -> bytes:
        """Returns the worker's proof.

        Raises:
            HandshakeError: the server does not have the secret.
        """
        nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(self._credentials, b"server", self._nonce, nonce)):
            raise HandshakeError("the server does not have this start's secret")
        return _proof(self._credentials, b"worker", self._nonce, nonce)


class ServerHandshake:
    """The server's part, from the moment at which it knows the start."""

    def __init__(self, credentials: Credentials, hello: bytes) -> None:
        self._credentials = credentials
        self._worker_nonce = hello[-_NONCE_BYTES:]
        self._nonce = secrets.token_bytes(_NONCE_BYTES)

    def answer(self) -> bytes:
        return self._nonce + _proof(self._credentials, b"server", self._worker_nonce, self._nonce)

    def check(self, proof: bytes) -> None:
        """Raises HandshakeError if the worker does not have the secret."""
        if not hmac.compare_digest(proof, _proof(self._credentials, b"worker", self._worker_nonce, self._nonce)):
            raise HandshakeError("it does not have the secret of the start that it names")


def start_id_of(hello: bytes) -> bytes:
    """Returns the start that a worker names. Raises HandshakeError if these are not a worker's first bytes."""
    if not hello.startswith(_MAGIC):
        raise HandshakeError("it does not speak as a worker of this version")
    return hello[len(_MAGIC) : len(_MAGIC) + _ID_BYTES]


def _proof(credentials: Credentials, role: bytes, worker_nonce: bytes, server_nonce: bytes) -> bytes:
    # All parts but the role have a fixed length, and the two roles are equally long.
    return hmac.digest(credentials.secret, role + credentials.start_id + worker_nonce + server_nonce, "sha256")
