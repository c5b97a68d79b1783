"""Messages on their way in: in turns, in time, and refused before they are kept."""

import asyncio

import grpc
import pytest

from dash_runtime.errors import InvalidRequest
from dash_server.receiving import Receiver
from dash_server.statuses import MessageTooSlow, QueueFull
from dash_server.turns import Turns


class FakeCall:
    """A call whose message arrives when it is told to."""

    def __init__(self, message: object = None) -> None:
        self._message: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.is_read = False
        if message is not None:
            self._message.set_result(message)

    def arrive(self, message: bytes) -> None:
        self._message.set_result(message)

    async def read(self) -> object:
        self.is_read = True
        return await self._message


async def receive(receiver: Receiver, call: FakeCall, name: str) -> bytes:
    async with receiver.message(call, name) as data:
        return data


async def test_a_message_that_is_not_read_yet_keeps_its_place() -> None:
    receiver = Receiver(1, 30.0)
    async with receiver.message(FakeCall(b"x"), "ann"):
        following = asyncio.create_task(receive(receiver, FakeCall(b"y"), "bob"))
        await asyncio.sleep(0.01)
        assert not following.done()
    assert await following == b"y"


async def test_a_message_is_received_and_a_call_without_one_is_refused() -> None:
    receiver = Receiver(1, 1.0)
    assert await receive(receiver, FakeCall(b"x"), "ann") == b"x"
    with pytest.raises(InvalidRequest, match="no message"):
        await receive(receiver, FakeCall(grpc.aio.EOF), "ann")
    assert await receive(receiver, FakeCall(b"y"), "ann") == b"y"


async def test_nothing_of_a_message_is_taken_before_its_turn() -> None:
    receiver = Receiver(1, 30.0)
    slow, waiting = FakeCall(), FakeCall(b"y")
    first = asyncio.create_task(receive(receiver, slow, "ann"))
    second = asyncio.create_task(receive(receiver, waiting, "ann"))
    await asyncio.sleep(0.01)
    assert (slow.is_read, waiting.is_read) == (True, False)
    slow.arrive(b"x")
    assert await asyncio.gather(first, second) == [b"x", b"y"]


async def test_a_message_that_does_not_come_in_time_is_given_up() -> None:
    receiver = Receiver(1, 0.02)
    with pytest.raises(MessageTooSlow):
        await receive(receiver, FakeCall(), "ann")
    assert await receive(receiver, FakeCall(b"y"), "ann") == b"y"


async def test_the_slowest_of_the_caller_with_most_gives_way_while_another_waits() -> None:
    receiver = Receiver(3, 30.0, patience_seconds=0.05)
    slow = [asyncio.create_task(receive(receiver, FakeCall(), "mallory")) for _ in range(3)]
    await asyncio.sleep(0.06)
    async with asyncio.timeout(5):
        assert await receive(receiver, FakeCall(b"y"), "bob") == b"y"
        with pytest.raises(MessageTooSlow):
            await slow[0]
    assert not any(task.done() for task in slow[1:])
    for task in slow[1:]:
        task.cancel()


async def test_a_free_place_goes_to_who_holds_the_fewest() -> None:
    turns, served = Turns(2), []

    async def take(name: str) -> None:
        await turns.take(name)
        served.append(name)

    await take("ann")
    await take("ann")
    waiting = [asyncio.create_task(take(name)) for name in ("ann", "ann", "bob", "eve")]
    await asyncio.sleep(0)
    for _ in range(4):
        turns.leave(served[-1] if len(served) > 2 else "ann")
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert served == ["ann", "ann", "bob", "eve", "ann", "ann"]
    assert turns.num_waiting == 0


async def test_who_gives_up_leaves_no_place_taken() -> None:
    turns = Turns(1)
    await turns.take("ann")
    waiting = [asyncio.create_task(turns.take("bob")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    turns.leave("ann")  # to the second, which is cancelled at the same moment
    waiting[1].cancel()
    await asyncio.gather(*waiting[:2], return_exceptions=True)
    await waiting[2]
    turns.leave("bob")
    async with asyncio.timeout(1):
        await turns.take("ann")


async def test_of_too_many_who_wait_the_caller_with_most_is_refused() -> None:
    turns = Turns(1, most_waiting=3)
    await turns.take("ann")
    crowd = [asyncio.create_task(turns.take("mallory")) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await turns.take("mallory")
    polite = asyncio.create_task(turns.take("bob"))
    with pytest.raises(QueueFull):
        await crowd[2]
    turns.leave("ann")
    await crowd[0]
    turns.leave("mallory")
    await polite
    crowd[1].cancel()
