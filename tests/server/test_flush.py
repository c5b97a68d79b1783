"""Tokens that share a message: which ones wait, how long at most, and that none is lost or late at an end."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from dash_api.v1 import generation_pb2
from dash_runtime.events import (
    DepthStatistics,
    EndReason,
    EngineEvent,
    SequenceFinished,
    TokenProduced,
)
from dash_server.statuses import WorkerUnavailable
from dash_server.worker.flush import MIN_STREAMS, Flush
from dash_server.worker.outbox import Delivery, Outbox
from tests.server.server_harness import RunningServer, fake_model, running_server


@dataclass
class FakeTimer:
    at: float
    callback: Callable[[], object]
    is_cancelled: bool = False

    def when(self) -> float:
        return self.at

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass
class FakeClock:
    now: float = 100.0
    timers: list[FakeTimer] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object], /) -> FakeTimer:
        self.timers.append(FakeTimer(when, callback))
        return self.timers[-1]

    def move_to(self, now: float) -> None:
        self.now = now
        due = [timer for timer in self.timers if timer.at <= now and not timer.is_cancelled]
        self.timers = [timer for timer in self.timers if timer.at > now and not timer.is_cancelled]
        for timer in due:
            timer.callback()


class Stream:
    """A reader that takes all that it can have, and notes when each token came."""

    def __init__(self, clock: FakeClock, name: str, delivery: Delivery = Delivery.SHARED) -> None:
        self.name = name
        self.outbox = Outbox(name, delivery)
        self.made_at: list[float] = []
        self.taken: list[tuple[float, list[int]]] = []
        self.is_over = False
        self._clock = clock
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while not self.is_over:
            output = await self.outbox.take(256)
            self.taken.append((self._clock.now, output.token_ids))
            self.is_over = output.finished is not None

    @property
    def waits(self) -> list[float]:
        """The time from a token's step to its reader, of each token that came."""
        came_at = [at for at, token_ids in self.taken for _ in token_ids]
        return [came - made for made, came in zip(self.made_at, came_at, strict=False)]

    @property
    def token_ids(self) -> list[int]:
        return [token_id for _, token_ids in self.taken for token_id in token_ids]

    @property
    def sizes(self) -> list[int]:
        return [len(token_ids) for _, token_ids in self.taken]


def finished(name: str) -> SequenceFinished:
    return SequenceFinished(name, EndReason.LENGTH, 3, 0, 0, DepthStatistics(2, [], {}, 2.0, 0))


async def settle() -> None:
    """Lets readers run that were woken."""
    for _ in range(3):
        await asyncio.sleep(0)


async def run_steps(
    flush: Flush, clock: FakeClock, streams: Iterable[Stream], seconds: Iterable[float], *, ends: bool = False
) -> None:
    """Gives each stream a token at each step. `seconds` are the times between them."""
    streams, pauses = list(streams), list(seconds)
    for number, pause in enumerate(pauses):
        end = clock.now + pause
        for timer in sorted(timer.at for timer in clock.timers if timer.at < end):
            clock.move_to(timer)
            await settle()
        clock.move_to(end)
        flush.begin_step(len(streams))
        for stream in streams:
            stream.made_at.append(clock.now)
            events: list[EngineEvent] = [TokenProduced(stream.name, len(stream.made_at))]
            if ends and number == len(pauses) - 1:
                events.append(finished(stream.name))
            for event in events:
                flush.put(stream.outbox, event)
        flush.end_step()
        await settle()


def streams_of(clock: FakeClock, count: int, delivery: Delivery = Delivery.SHARED) -> list[Stream]:
    return [Stream(clock, f"stream {number}", delivery) for number in range(count)]


@pytest.mark.parametrize(("step", "tokens_together"), [(0.005, 5), (0.01, 3), (0.02, 2)])
async def test_tokens_of_short_steps_leave_together_and_none_waits_too_long(step: float, tokens_together: int) -> None:
    clock = FakeClock()
    flush = Flush(0.025, clock)
    streams = streams_of(clock, MIN_STREAMS)
    await run_steps(flush, clock, streams, [step] * 60, ends=True)
    for stream in streams:
        assert stream.is_over
        assert stream.token_ids == list(range(1, 61))
        assert stream.waits[0] == 0
        assert max(stream.waits) <= 0.025
        assert max(stream.sizes) in (tokens_together, tokens_together + 1)
    assert len({tuple(stream.sizes) for stream in streams}) == 1  # all leave at the same moments


async def test_no_token_waits_longer_than_the_setting_however_uneven_the_steps_are() -> None:
    clock = FakeClock()
    flush = Flush(0.02, clock)
    streams = streams_of(clock, 8)
    pauses = [0.003, 0.004, 0.3, 0.002, 0.05, 0.001, 0.001, 0.019, 0.021, 0.004] * 20
    await run_steps(flush, clock, streams, pauses, ends=True)
    waits = [wait for stream in streams for wait in stream.waits]
    assert 0 < max(waits) <= 0.02 + 1e-9
    assert all(stream.token_ids == list(range(1, 201)) for stream in streams)


async def test_no_token_waits_for_a_step_that_comes_too_late() -> None:
    clock = FakeClock()
    flush = Flush(0.025, clock)
    streams = streams_of(clock, 64)
    await run_steps(flush, clock, streams, [0.03] * 20)
    assert all(set(stream.waits) == {0} for stream in streams)
    assert clock.timers == []


@pytest.mark.parametrize(
    ("count", "milliseconds", "delivery"),
    [
        (MIN_STREAMS - 1, 25, Delivery.SHARED),
        (1, 25, Delivery.SHARED),
        (64, 0, Delivery.SHARED),
        (64, 25, Delivery.AT_ONCE),
    ],
)
async def test_few_streams_no_patience_or_the_callers_wish_give_each_token_alone(
    count: int, milliseconds: float, delivery: Delivery
) -> None:
    clock = FakeClock()
    flush = Flush(milliseconds / 1e3, clock)
    streams = streams_of(clock, count, delivery)
    await run_steps(flush, clock, streams, [0.002] * 30)
    assert all(stream.sizes == [1] * 30 and set(stream.waits) == {0} for stream in streams)


async def test_the_first_token_and_the_end_never_wait_beside_streams_that_do() -> None:
    clock = FakeClock()
    flush = Flush(0.025, clock)
    streams = streams_of(clock, 8)
    await run_steps(flush, clock, streams, [0.005] * 12)  # the streams after the first wait now
    late = Stream(clock, "late")
    await settle()
    await run_steps(flush, clock, [*streams, late], [0.005])
    assert late.waits == [0]
    assert any(len(stream.waits) < len(stream.made_at) for stream in streams)
    await run_steps(flush, clock, [*streams, late], [0.005], ends=True)
    assert late.waits[-1] == 0
    assert all(len(stream.waits) == len(stream.made_at) and stream.is_over for stream in (*streams, late))


async def test_an_output_that_is_wanted_whole_wakes_its_reader_a_few_times_only() -> None:
    clock = FakeClock()
    flush = Flush(0, clock)
    streams = streams_of(clock, 1, Delivery.WHOLE)
    await run_steps(flush, clock, streams, [0.01] * 200, ends=True)
    assert streams[0].token_ids == list(range(1, 201))
    assert streams[0].sizes == [1, 64, 64, 64, 7]


async def test_tokens_that_wait_come_before_the_error_and_the_error_does_not_wait() -> None:
    outbox = Outbox("r", Delivery.SHARED)
    outbox.put(TokenProduced("r", 1), may_share=True)
    assert (await outbox.take(256)).token_ids == [1]
    reader = asyncio.create_task(outbox.take(256))
    await asyncio.sleep(0)
    assert outbox.put(TokenProduced("r", 2), may_share=True)
    await asyncio.sleep(0)
    assert not reader.done()
    outbox.fail(WorkerUnavailable("gone"))
    assert (await reader).token_ids == [2]
    with pytest.raises(WorkerUnavailable):
        await outbox.take(256)


async def events_of(
    server: RunningServer, num_streams: int, **parameters: object
) -> list[list[generation_pb2.StreamGenerateResponse]]:
    """Returns the events of as many equal streams at once."""

    async def read() -> list[generation_pb2.StreamGenerateResponse]:
        return [event async for event in server.stream(text="Grüße, 世界! ", **parameters)]

    return await asyncio.gather(*(read() for _ in range(num_streams)))


def sizes_of(events: list[generation_pb2.StreamGenerateResponse]) -> list[int]:
    """Returns the number of tokens of each message that has some."""
    return [len(event.delta.token_ids) for event in events if event.delta.token_ids]


@pytest.mark.alone  # beside busy tests a first token may not be read before the second has come
async def test_many_streams_share_messages_and_have_the_text_tokens_and_extras_of_one_alone(model_folder: Path) -> None:
    output = generation_pb2.OutputOptions(return_decisions=True, logprobs=2)
    async with running_server(fake_model(model_folder, token_seconds=0.008), slots=16) as server:
        alone = await server.generate(text="Grüße, 世界! ", max_new_tokens=100, output=output)
        firsts: list[int] = []
        for events in await events_of(server, 16, max_new_tokens=100, output=output):
            kinds = [event.WhichOneof("event") for event in events]
            assert (kinds[0], kinds[-1], set(kinds[1:-1])) == ("started", "finished", {"delta"})
            deltas = [event.delta for event in events[1:-1]]
            assert "".join(delta.text for delta in deltas) == alone.output.text
            assert [id_ for delta in deltas for id_ in delta.token_ids] == alone.output.token_ids
            assert b"".join(delta.actions for delta in deltas) == alone.output.actions
            assert [entry for delta in deltas for entry in delta.logprobs] == list(alone.output.logprobs)
            for delta in deltas:
                assert len(delta.logprobs) == len(delta.token_ids)
                assert len(delta.actions) == 3 * len(delta.token_ids)
            firsts.append(sizes_of(events)[0])
            assert len(sizes_of(events)) < 70
        assert firsts.count(1) > 8  # a busy machine merges some that were not read in time


@pytest.mark.alone  # beside busy tests many tokens may have come before a first one is read
async def test_a_stream_alone_and_a_caller_that_asks_for_it_get_each_token_alone(model_folder: Path) -> None:
    output = generation_pb2.OutputOptions(immediate=True)
    async with running_server(fake_model(model_folder, token_seconds=0.02), slots=8) as server:
        for number, options in ((1, {}), (8, {"output": output}), (8, {"stop_strings": ("nowhere",)})):
            for events in await events_of(server, number, max_new_tokens=20, **options):
                assert len(sizes_of(events)) > 15  # a busy machine merges some that were not read in time


@pytest.mark.parametrize(
    ("options", "milliseconds", "size"),
    [
        ({}, 25, 4),
        ({}, 0, 1),
        ({"output": generation_pb2.OutputOptions(immediate=True)}, 25, 1),
        ({"stop_strings": ("nowhere",)}, 25, 1),
    ],
    ids=["as a rule", "by the setting", "by the caller's wish", "for a stop string"],
)
async def test_a_burst_is_one_message_unless_each_token_is_wanted(
    model_folder: Path, options: dict[str, object], milliseconds: float, size: int
) -> None:
    model = fake_model(model_folder, token_seconds=0.02, burst=4)
    async with running_server(model, flush_milliseconds=milliseconds) as server:
        (events,) = await events_of(server, 1, max_new_tokens=40, **options)
        sizes = sizes_of(events)
        assert sum(sizes) == 40
        assert sizes.count(size) >= 40 / size - 5  # a busy machine merges some that were not read in time


async def read_until_lost(call: grpc.aio.UnaryStreamCall) -> int:
    """Returns the number of tokens that came before UNAVAILABLE."""
    num_tokens = 0
    with contextlib.suppress(grpc.aio.AioRpcError):
        while True:
            event = await call.read()
            num_tokens += len(event.delta.token_ids)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    return num_tokens


async def test_a_dead_workers_tokens_that_waited_come_before_the_error(model_folder: Path) -> None:
    model = fake_model(model_folder, token_seconds=0.004, die_after=400)  # without the tokens of that step
    async with running_server(model, slots=8) as server:
        calls = [server.stream(text="abc", max_new_tokens=900) for _ in range(8)]
        numbers = await asyncio.gather(*map(read_until_lost, calls))
        assert 392 <= sum(numbers) < 400
