"""HTTP/2 frames of calls that no gRPC client would make. Knows bytes; opens nothing."""

import struct
from collections.abc import Iterator

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
GENERATE = "/dash_api.v1.GenerationService/Generate"
STREAM_GENERATE = "/dash_api.v1.GenerationService/StreamGenerate"
SESSION = "/dash_api.v1.GenerationService/Session"
HEALTH = "/grpc.health.v1.Health/Check"
_CANCEL = struct.pack(">I", 8)
_STREAMS_AT_ONCE = 100


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Returns a frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def call_headers(path: str, token: str | None = None, encoding: str | None = None) -> list[tuple[str, str]]:
    """Returns the headers of a call."""
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    headers += [] if token is None else [("authorization", f"Bearer {token}")]
    return headers + ([] if encoding is None else [("grpc-encoding", encoding)])


def prefixed(message: bytes, num_bytes: int | None = None, is_compressed: bool = False) -> bytes:
    """Returns a message as gRPC sends it; `num_bytes` is the length that is claimed."""
    return bytes([is_compressed]) + struct.pack(">I", len(message) if num_bytes is None else num_bytes) + message


def opened_and_reset_streams(message: bytes, num_streams: int) -> Iterator[bytes]:
    """Yields the bytes of a connection with whole requests, each of them cancelled at once."""
    yield PREFACE + frame(SETTINGS, 0, 0)
    encoder, headers, data = hpack.Encoder(), call_headers(GENERATE), prefixed(message)
    for first in range(0, num_streams, _STREAMS_AT_ONCE):
        yield b"".join(
            frame(HEADERS, END_HEADERS, stream, encoder.encode(headers))
            + frame(DATA, END_STREAM, stream, data)
            + frame(RST_STREAM, 0, stream, _CANCEL)
            for stream in range(2 * first + 1, 2 * (first + _STREAMS_AT_ONCE), 2)
        )


def endless_headers() -> Iterator[bytes]:
    """Yields the bytes of a call whose headers never end."""
    yield PREFACE + frame(SETTINGS, 0, 0)
    yield frame(HEADERS, 0, 1, hpack.Encoder().encode(call_headers(GENERATE)))
    piece = hpack.Encoder().encode([("x", "y" * 1000)])
    while True:
        yield frame(CONTINUATION, 0, 1, piece) * 16


def endless(kind: int, payload: bytes) -> Iterator[bytes]:
    """Yields the bytes of a connection with one kind of frame and nothing else."""
    yield PREFACE + frame(SETTINGS, 0, 0)
    while True:
        yield frame(kind, 0, 0, payload) * 64
