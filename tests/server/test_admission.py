"""Bounds on requests and tokens, in total and per caller, and evictions between callers."""

import asyncio
from contextlib import ExitStack

import pytest

from dash_server.admission import Admission, Place
from dash_server.auth import Caller, CallerLimits
from dash_server.statuses import CallerLimitReached, QueueFull, ShuttingDown

ANN, BOB = Caller("ann"), Caller("bob")


class Waiting:
    """A waiting room in which all admitted requests still wait."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.evicted: list[str] = []

    def longest_line(self, but: str) -> int:
        names = [place.caller.name for place in self.places]
        longest = max(names, key=names.count, default=but)
        return 0 if longest == but else names.count(longest)

    def evict_newest(self, but: str) -> None:
        place = next(place for place in reversed(self.places) if place.caller.name != but)
        self.places.remove(place)
        self.evicted.append(place.caller.name)
        place.release()


async def test_admission_is_bounded_and_frees_its_places() -> None:
    admission = Admission(2)
    with admission.admit(ANN):
        with admission.admit(ANN), pytest.raises(QueueFull):
            admission.admit(ANN).__enter__()
        with admission.admit(ANN):
            assert admission.num_inside == 2
    assert admission.num_inside == 0


async def test_an_answer_that_is_not_read_keeps_nobody_else_out_and_not_too_many_are_kept() -> None:
    admission = Admission(2)
    with ExitStack() as calls:
        for _ in range(2):
            calls.enter_context(admission.admit(ANN)).release()  # the worker is done; the caller has yet to read
        assert admission.num_inside == 0
        with pytest.raises(CallerLimitReached, match="2 answers that it has not read"):
            admission.admit(ANN).__enter__()
        for _ in range(2):
            calls.enter_context(admission.admit(BOB))
        idle = asyncio.create_task(admission.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await idle


async def test_a_draining_admission_refuses_and_tells_when_it_is_empty() -> None:
    admission = Admission(2)
    with admission.admit(ANN):
        admission.drain()
        with pytest.raises(ShuttingDown):
            admission.admit(ANN).__enter__()
        idle = asyncio.create_task(admission.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await idle


async def test_tokens_inside_are_bounded_and_freed() -> None:
    admission = Admission(10, 100)
    with admission.admit(ANN) as first:
        admission.claim(first, 60)
        with admission.admit(ANN) as second, pytest.raises(QueueFull):
            admission.claim(second, 41)
        with admission.admit(ANN) as third:
            admission.claim(third, 40)
            assert admission.num_tokens_inside == 100
    assert admission.num_tokens_inside == 0


async def test_a_callers_own_limits_hold_for_that_caller_only() -> None:
    admission = Admission(10, 1000)
    limited = Caller("limited", CallerLimits(max_requests=1, max_tokens=50))
    with admission.admit(limited) as place:
        with pytest.raises(CallerLimitReached, match="1 requests"):
            admission.admit(limited).__enter__()
        with pytest.raises(CallerLimitReached, match="50 tokens"):
            admission.claim(place, 51)
        with admission.admit(BOB) as other:
            admission.claim(other, 500)
    with admission.admit(limited) as place:
        admission.claim(place, 50)


async def test_one_callers_backlog_makes_room_for_another_until_both_have_alike() -> None:
    room = Waiting()
    admission = Admission(6, waiting_room=room)
    with ExitStack() as stack:

        def enter(caller: Caller) -> None:
            place = stack.enter_context(admission.admit(caller))
            admission.claim(place, 1)
            room.places.append(place)

        for _ in range(6):
            enter(ANN)
        with pytest.raises(QueueFull):
            enter(ANN)
        for _ in range(3):
            enter(BOB)
            assert admission.num_inside == 6
        with pytest.raises(QueueFull):
            enter(BOB)
        assert room.evicted == ["ann"] * 3
    assert admission.num_inside == 0


async def test_a_request_that_turns_out_wrong_has_put_nobody_out() -> None:
    room = Waiting()
    admission = Admission(2, waiting_room=room)
    with admission.admit(ANN) as first, admission.admit(ANN) as second:
        room.places += [first, second]
        with admission.admit(BOB):
            pass  # refused while it was read: it never claimed its tokens
        assert (room.evicted, admission.num_inside) == ([], 2)


async def test_tokens_too_are_made_room_for() -> None:
    room = Waiting()
    admission = Admission(10, 100, waiting_room=room)
    with ExitStack() as stack:
        for _ in range(4):
            place = stack.enter_context(admission.admit(ANN))
            admission.claim(place, 25)
            room.places.append(place)
        place = stack.enter_context(admission.admit(BOB))
        admission.claim(place, 40)
        assert (room.evicted, admission.num_tokens_inside) == (["ann", "ann"], 90)


async def test_callers_that_have_left_are_forgotten() -> None:
    admission = Admission(2)
    for number in range(1000):
        with admission.admit(Caller(f"address-{number}")) as place:
            admission.claim(place, 1)
    assert not admission._requests
    assert not admission._tokens
