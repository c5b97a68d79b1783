"""A DNS server for one name, on a port of its own: gRPC asks it for `dns://127.0.0.1:PORT/any.name:50051`."""

import socket
import socketserver
import struct
import threading
from typing import Self

_TYPE_A = 1
_CLASS_IN = 1
_RECURSIVE_ANSWER = 0x8180
_HEADER_BYTES = 12
_NAME_OF_THE_QUESTION = 0xC000 | _HEADER_BYTES


class NameServer:
    """Answers every question for IPv4 addresses with `addresses`, which may change, and all others with none."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        owner = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                query, reply_socket = self.request
                reply_socket.sendto(owner.answer(query), self.client_address)

        self._server = socketserver.UDPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def target(self, port: int) -> str:
        """Returns gRPC's target for the name, asked of this server."""
        return f"dns://127.0.0.1:{self._server.server_address[1]}/fronts.test:{port}"

    def answer(self, query: bytes) -> bytes:
        """Returns the reply to a query of one question (RFC 1035, section 4)."""
        end = _HEADER_BYTES
        while query[end]:
            end += 1 + query[end]
        question = query[_HEADER_BYTES : end + 5]
        (kind,) = struct.unpack(">H", query[end + 1 : end + 3])
        found = list(self.addresses) if kind == _TYPE_A else []
        header = query[:2] + struct.pack(">5H", _RECURSIVE_ANSWER, 1, len(found), 0, 0)
        records = (
            struct.pack(">HHHIH", _NAME_OF_THE_QUESTION, _TYPE_A, _CLASS_IN, 0, 4) + socket.inet_aton(address)
            for address in found
        )
        return header + question + b"".join(records)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
