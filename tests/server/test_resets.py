"""A connection that opens and resets streams as fast as it can keeps nobody else waiting."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hpack
import pytest

from dash_client import DashClient
from tests.server.server_harness import ServerProcess, fake_model, generation_request, server_process, write_tokens

NUM_STREAMS = 20_000
TOKEN = "ann-s-token-which-is-long-enough"
_AT_ONCE = 100
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0, 1, 3, 4
_END_STREAM, _END_HEADERS = 1, 4
_CANCEL = struct.pack(">I", 8)


@pytest.fixture(params=["anybody", "callers with tokens"])
def server(request: pytest.FixtureRequest, tmp_path: Path, model_folder: Path) -> Iterator[ServerProcess]:
    """A server for anybody, or one that refuses the resetting connection's calls."""
    options: dict[str, object] = {}
    if request.param != "anybody":
        options["token_file"] = write_tokens(tmp_path, ann=TOKEN)
    with server_process(tmp_path, model=fake_model(model_folder), **options) as running:
        yield running


def test_the_next_caller_is_answered_within_a_second(server: ServerProcess) -> None:
    port = server.wait_for_port()
    with DashClient(f"localhost:{port}", token=TOKEN, retries=0) as client:
        client.wait_until_ready(30)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            threading.Thread(target=drain, args=(connection,), daemon=True).start()
            with contextlib.suppress(ConnectionError):  # the server may close it
                for piece in opened_and_reset_streams():
                    connection.sendall(piece)
            begin = time.monotonic()
            answers = [client.generate("ab", max_new_tokens=2).text for _ in range(3)]
            assert time.monotonic() - begin < 1
        assert answers == ["ab"] * 3
    assert len(server.log.read_text().splitlines()) < NUM_STREAMS / 10


def opened_and_reset_streams() -> Iterator[bytes]:
    """Yields the bytes of a connection with whole requests, each of them cancelled at once."""
    yield _PREFACE + frame(_SETTINGS, 0, 0)
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/dash_api.v1.GenerationService/Generate"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    encoder, message = hpack.Encoder(), generation_request(text="hello").SerializeToString()
    data = b"\0" + struct.pack(">I", len(message)) + message
    for first in range(0, NUM_STREAMS, _AT_ONCE):
        yield b"".join(
            frame(_HEADERS, _END_HEADERS, stream, encoder.encode(headers))
            + frame(_DATA, _END_STREAM, stream, data)
            + frame(_RST_STREAM, 0, stream, _CANCEL)
            for stream in range(2 * first + 1, 2 * (first + _AT_ONCE), 2)
        )


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def drain(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(1 << 16):
            pass
