"""The server's end of a connection: messages come in order however they are read, and a wrong one ends them."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dash_server.worker.connection import FramedConnection
from dash_server.worker.messages import FromWorker, Pong, Starting, decode_from_worker, encode_frame


@asynccontextmanager
async def open_connection() -> AsyncIterator[tuple[FramedConnection[FromWorker], socket.socket]]:
    """Opens a connection; gives the other end too."""
    ours, theirs = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
    connection = FramedConnection(transport, decode_from_worker)
    with theirs:
        try:
            yield connection, theirs
        finally:
            connection.abort()
            await asyncio.sleep(0)


def numbered(*numbers: int) -> bytes:
    return b"".join(encode_frame(Starting(str(number))) for number in numbers)


async def test_messages_that_were_not_read_are_delivered_before_later_ones_until_the_other_end_closes() -> None:
    async with open_connection() as (connection, worker):
        messages = connection.messages()
        worker.sendall(numbered(1, 2, 3))
        assert await anext(messages) == Starting("1")
        received: list[FromWorker] = []
        delivery = asyncio.create_task(connection.deliver(received.append))
        await asyncio.sleep(0.01)
        frames = numbered(4, 5)
        worker.sendall(frames[:7])
        await asyncio.sleep(0.01)
        worker.sendall(frames[7:])
        worker.close()
        async with asyncio.timeout(5):
            await delivery
            assert await anext(messages, None) is None
    assert received == [Starting(str(number)) for number in (2, 3, 4, 5)]


async def test_a_message_that_cannot_be_understood_ends_the_delivery_after_those_before_it() -> None:
    async with open_connection() as (connection, worker):
        received: list[FromWorker] = []
        worker.sendall(encode_frame(Pong()) + encode_frame("what is this?") + encode_frame(Pong()))
        async with asyncio.timeout(5):
            await connection.deliver(received.append)
    assert received == [Pong()]
