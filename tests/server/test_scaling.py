"""How many workers there are: the rule by a clock that the test turns, and workers that come and go."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from dash_server.dispatcher import Load
from dash_server.scaling import Change, Demand, Scaler, WorkerRange
from dash_server.settings import Settings
from dash_server.worker.link import WorkerLink
from dash_server.worker.starter import WorkerStartError
from dash_server.worker_pool import WorkerPool
from tests.server.server_harness import fake_model, running_server
from tests.server.test_workers import wait_for_workers, worker_pids


class Clock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def demand(num_workers: int, num_running: int, num_waiting: int = 0, num_ready: int | None = None) -> Demand:
    """Workers of four slots each."""
    ready = num_workers if num_ready is None else num_ready
    return Demand(num_workers, ready, 4 * ready, num_running, num_waiting)


def changes(scaler: Scaler, clock: Clock, asked: Demand, seconds: int) -> list[tuple[float, Change]]:
    """Asks every second, and returns what the scaler said and when."""
    said = []
    for _ in range(seconds):
        if (change := scaler.change(asked)) is not None:
            said.append((clock.now, change))
        clock.now += 1
    return said


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scaler(clock: Clock) -> Scaler:
    return Scaler(WorkerRange(2, 4), clock)


def test_a_worker_is_added_when_requests_have_waited_for_five_seconds(scaler: Scaler, clock: Clock) -> None:
    assert changes(scaler, clock, demand(2, 8, num_waiting=1), 8) == [(5, Change.ADD)]


def test_a_queue_that_empties_meanwhile_adds_none(scaler: Scaler, clock: Clock) -> None:
    for _ in range(10):
        assert changes(scaler, clock, demand(2, 8, num_waiting=1), 4) == []
        assert changes(scaler, clock, demand(2, 8), 1) == []


def test_while_one_starts_no_other_is_added(scaler: Scaler, clock: Clock) -> None:
    assert changes(scaler, clock, demand(3, 8, num_waiting=9, num_ready=2), 100) == []
    assert changes(scaler, clock, demand(3, 12, num_waiting=9), 6) == [(105, Change.ADD)]


def test_there_are_never_more_than_the_most_or_fewer_than_the_least(scaler: Scaler, clock: Clock) -> None:
    assert changes(scaler, clock, demand(4, 16, num_waiting=9), 100) == []
    assert changes(scaler, clock, demand(2, 0), 300) == []


def test_a_worker_is_removed_when_one_less_would_have_done_for_a_minute(scaler: Scaler, clock: Clock) -> None:
    assert changes(scaler, clock, demand(3, 9), 200) == []
    assert changes(scaler, clock, demand(3, 8), 59) == []
    assert changes(scaler, clock, demand(3, 9), 1) == []
    assert changes(scaler, clock, demand(3, 8), 62) == [(320, Change.REMOVE)]


@pytest.mark.parametrize("text", ["0", "-1", "65", "3-2", "1-65", "two", "2-", "-", "1.5"])
def test_what_is_no_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        WorkerRange.parse(text)


def test_a_number_of_workers_or_a_range_is_read_and_shown_as_it_was_given() -> None:
    assert WorkerRange.parse("3") == WorkerRange(3, 3)
    assert WorkerRange.parse("2-8") == WorkerRange(2, 8)
    assert [str(WorkerRange.parse(text)) for text in ("3", "2-8")] == ["3", "2-8"]
    assert " workers=2-8 " in Settings(workers="2-8").loggable()


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_server.worker_pool._TICK_SECONDS", 0.02)


async def turn(clock: Clock, seconds: float) -> None:
    """Lets the pool look before the time and after it."""
    await asyncio.sleep(0.1)
    clock.now += seconds
    await asyncio.sleep(0.1)


@pytest.mark.usefixtures("quick_ticks")
async def test_workers_come_with_the_load_and_leave_when_their_requests_are_over(
    model_folder: Path, clock: Clock
) -> None:
    model = fake_model(model_folder, token_seconds=0.005)
    async with running_server(model, workers="1-2", slots=2, clock=clock) as server:
        calls = []
        for length, counts in ((3000, (1, 0)), (3000, (2, 0)), (2000, (2, 1)), (300, (2, 2))):
            calls.append(server.stream(text="abc", max_new_tokens=length))
            await server.wait_until_inside(*counts)
        assert len(worker_pids()) == 1
        await turn(clock, 5)
        await wait_for_workers(2)
        await server.wait_until_inside(4, 0)
        # With two left, one on each worker, one worker would be enough. The one with less to do is removed.
        calls[0].cancel()
        calls[2].cancel()
        await server.wait_until_inside(2, 0)
        await turn(clock, 60)
        assert len(worker_pids()) == 2
        assert server.server.dispatcher.load().num_slots == 2
        await server.generate(text="abc", max_new_tokens=3)
        *_, last = [message async for message in calls[3]]
        assert last.finished.usage.output_token_count == 300
        await wait_for_workers(1)
        assert await server.is_serving()
        # And with more to do, there are two again.
        more = [server.stream(text="abc", max_new_tokens=3000) for _ in range(2)]
        await server.wait_until_inside(2, 1)
        await turn(clock, 5)
        await wait_for_workers(2)
        await server.wait_until_inside(3, 0)
        for call in (calls[1], *more):
            call.cancel()


@pytest.mark.usefixtures("quick_ticks")
async def test_a_worker_that_is_being_removed_stays_if_requests_wait_again(model_folder: Path, clock: Clock) -> None:
    model = fake_model(model_folder, token_seconds=0.005)
    async with running_server(model, workers="1-2", slots=1, clock=clock) as server:
        calls = [server.stream(text="abc", max_new_tokens=3000) for _ in range(2)]
        await server.wait_until_inside(1, 1)
        await turn(clock, 5)
        await server.wait_until_inside(2, 0)
        first, second = server.server._links
        second.drain()
        server.server._pool._draining.add(second)
        pids = worker_pids()
        calls.append(server.stream(text="abc", max_new_tokens=3000))
        await server.wait_until_inside(2, 1)
        await turn(clock, 5)
        assert second.is_ready
        assert worker_pids() == pids
        calls[1].cancel()
        await server.wait_until_inside(2, 0)
        assert [first.num_requests, second.num_requests] == [1, 1]
        for call in calls:
            call.cancel()


class FailingLink:
    """A link whose worker is ready at once, and is given up when the test says so."""

    def __init__(self) -> None:
        self.is_ready = True
        self.num_requests = 1
        self.given_up = asyncio.Event()

    async def wait_ready(self) -> None:
        pass

    async def run(self) -> None:
        await self.given_up.wait()
        raise WorkerStartError("the worker is given up", is_for_user=False)


@pytest.mark.usefixtures("quick_ticks")
async def test_a_worker_that_is_being_removed_is_not_one_that_remains_when_the_last_is_given_up(clock: Clock) -> None:
    last, leaving = FailingLink(), FailingLink()
    links = [cast(WorkerLink, link) for link in (last, leaving)]
    pool = WorkerPool(links, WorkerRange(1, 2), lambda: Load(1, 0, 1, 1, 1, 1, None, None), clock)
    running = asyncio.create_task(pool.run())
    await asyncio.sleep(0.1)
    pool._start(links[1])
    pool._draining.add(links[1])
    last.given_up.set()
    with pytest.raises(WorkerStartError):
        await asyncio.wait_for(running, 10)
