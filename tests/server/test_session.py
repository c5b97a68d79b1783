"""Sessions over a real socket: many generations on one stream, none of which changes anything for another."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from dash_api.v1 import generation_pb2
from dash_server.request_record import RequestRecord
from dash_server.session import _Outgoing, _parts
from tests.server.open_session import OpenSession, open_session
from tests.server.server_harness import RunningServer, fake_model, generation_request, running_server, write_tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

OK, CANCELLED = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED
INVALID, UNAVAILABLE = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE
TOKEN = "a-token-that-is-long"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model_folder: Path) -> AsyncIterator[RunningServer]:
    async with running_server(fake_model(model_folder, token_seconds=0.005), slots=8) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def session(server: RunningServer) -> AsyncIterator[OpenSession]:
    async with open_session(server) as opened:
        yield opened
    assert (await server.wait_for_live_requests(0)).num_live == 0


async def test_a_generation_has_the_events_of_a_call(server: RunningServer, session: OpenSession) -> None:
    parameters = {"text": "Grüße, 世界! ", "max_new_tokens": 30}
    await session.begin(1, **parameters)
    assert await session.end_of(1) is OK
    own = session.events[1]
    call = [event async for event in server.stream(**parameters)]
    for events in (own, call):
        assert [event.WhichOneof("event") for event in (events[0], events[-1])] == ["started", "finished"]
        assert {event.WhichOneof("event") for event in events[1:-1]} == {"delta"}
        events[0].started.request_id, events[0].started.seed = "", 0
        events[-1].finished.usage.queue_seconds = 0
    assert session.text(1) == "".join(event.delta.text for event in call)
    assert (own[0], own[-1]) == (call[0], call[-1])


async def test_the_tokens_of_a_step_leave_in_one_message(session: OpenSession) -> None:
    for number in range(8):
        await session.begin(number, text="abc", max_new_tokens=50)
    assert {await session.end_of(number) for number in range(8)} == {OK}
    assert {session.text(number) for number in range(8)} == {("abc" * 17)[:50]}
    assert len(session.messages) < 8 * 50 / 4


async def test_several_answers_come_with_their_numbers(session: OpenSession) -> None:
    await session.begin(5, text="abc", max_new_tokens=5, n=3)
    assert await session.end_of(5) is OK
    for index in range(3):
        own = [event for event in session.events[5] if event.answer_index == index]
        assert "".join(event.delta.text for event in own) == "abcab"


async def test_a_session_ends_when_the_caller_has_closed_its_side_and_all_is_over(session: OpenSession) -> None:
    await session.begin(1, text="abc", max_new_tokens=20)
    await session.call.done_writing()
    assert await session.end() is OK
    assert session.ends == {1: OK}


async def test_a_wrong_request_fails_alone(session: OpenSession) -> None:
    await session.begin(1, text="abc", max_new_tokens=60)
    await session.begin(2, text="abc", sampling=generation_pb2.SamplingParameters(top_p=2))
    await session.begin(3, {"timeout_seconds": -1.0}, text="abc")
    await session.send(generation_pb2.SessionRequest(number=4).SerializeToString())
    wrong = {2: "parameters.sampling.top_p", 3: "timeout_seconds", 4: "action"}
    for number, field in wrong.items():
        assert await session.end_of(number) is INVALID
        details = session.details(number)
        assert [violation.field for violation in details["BadRequest"].field_violations] == [field]
        assert session.errors[number].message.startswith(f"{field}: ")
        assert len(details["ErrorInfo"].metadata["request_id"]) == 32
    assert await session.end_of(1) is OK


async def test_a_request_that_cannot_be_read_fails_alone(session: OpenSession) -> None:
    await session.begin(1, text="abc", max_new_tokens=60)
    text = generation_pb2.SessionRequest(number=2)
    text.generate.parameters.text = "????"
    await session.send(text.SerializeToString().replace(b"????", b"\xff\xff\xff\xff"))
    generate = generation_pb2.SessionRequest(number=3)
    generate.generate.parameters.text = "a"
    cancel = generation_pb2.SessionRequest(cancel=generation_pb2.SessionCancel())
    await session.send(generate.SerializeToString() + cancel.SerializeToString())
    for number, field in {2: "parameters.text", 3: "action"}.items():
        assert await session.end_of(number) is INVALID
        assert session.errors[number].message.startswith(f"{field}: ")
    assert await session.end_of(1) is OK


async def test_bytes_without_a_number_end_the_session(server: RunningServer, session: OpenSession) -> None:
    await session.begin(1, text="abc", max_new_tokens=4000)
    await session.until_begun(1)
    await session.send(b"\xff\xff\xff")
    assert await session.end() is INVALID
    assert (await server.wait_for_live_requests(0)).num_live == 0


async def test_a_number_that_is_in_use_ends_the_session_and_one_that_is_over_may_be_used_again(
    session: OpenSession,
) -> None:
    await session.begin(1, text="abc", max_new_tokens=2)
    await session.end_of(1)
    session.ends.clear()
    session.events.clear()
    await session.begin(1, text="abc", max_new_tokens=4000)
    await session.until_begun(1)
    await session.begin(1, text="abc")
    assert await session.end() is INVALID
    assert (await session.call.details()).startswith("number: 1 belongs to a generation")


async def test_a_cancelled_generation_frees_its_slot_and_the_others_go_on(
    server: RunningServer, session: OpenSession
) -> None:
    before = (await server.probe()).num_cancels
    await session.begin(1, text="abc", max_new_tokens=4000)
    await session.begin(2, text="abc", max_new_tokens=100)
    await session.until_begun(1)
    await session.cancel(1)
    await session.cancel(77)
    assert await session.end_of(1) is CANCELLED
    assert await session.end_of(2) is OK
    assert (await server.wait_for_live_requests(0)).num_cancels == before + 1


async def test_the_deadline_ends_a_generation_and_no_other(server: RunningServer, session: OpenSession) -> None:
    await session.begin(1, {"timeout_seconds": 0.3}, text="abc", max_new_tokens=4000)
    await session.begin(2, {"timeout_seconds": 30.0}, text="abc", max_new_tokens=100)
    assert await session.end_of(1) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await session.end_of(2) is OK
    assert (await server.wait_for_live_requests(0)).num_live == 0


async def test_a_caller_that_leaves_frees_all_slots(server: RunningServer) -> None:
    async with open_session(server) as session:
        for number in range(4):
            await session.begin(number, text="abc", max_new_tokens=1000)
        await session.until_begun(3)
        assert (await server.probe()).num_live == 4
    assert (await server.wait_for_live_requests(0)).num_live == 0
    assert server.server.admission.num_inside == 0


async def test_each_generation_has_its_own_record_and_span(server: RunningServer, session: OpenSession) -> None:
    records: list[RequestRecord] = []
    server.server._state.observers.append(records.append)
    await session.begin(1, {"traceparent": PARENT}, text="abc", max_new_tokens=2)
    await session.begin(2, text="abc", max_new_tokens=3)
    await session.begin(3, {"timeout_seconds": 1.0}, text="abc", max_new_tokens=4000)
    await session.begin(4, text="", max_new_tokens=3)
    for number in range(1, 5):
        await session.end_of(number)
    by_id = {record.request_id: record for record in records}
    first, second, third = (by_id[session.events[number][0].started.request_id] for number in (1, 2, 3))
    assert first.method == "dash_api.v1.GenerationService/Session"
    assert (first.metadata, second.metadata) == ({"traceparent": PARENT}, {})
    assert [record.num_output_tokens for record in (first, second)] == [2, 3]
    assert [record.code for record in (first, second, third)] == [OK, OK, grpc.StatusCode.DEADLINE_EXCEEDED]
    refused = by_id[session.details(4)["ErrorInfo"].metadata["request_id"]]
    assert refused.code is INVALID


async def test_a_full_server_says_when_to_come_back(model_folder: Path) -> None:
    limits = {"slots": 1, "max_queue": 1}
    async with (
        running_server(fake_model(model_folder, token_seconds=0.005), **limits) as server,
        open_session(server) as session,
    ):
        for number in range(3):
            await session.begin(number, text="abc", max_new_tokens=100)
        assert await session.end_of(2) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert session.details(2)["RetryInfo"].retry_delay.ToMilliseconds() > 0
        assert {await session.end_of(number) for number in range(2)} == {OK}


async def test_a_dead_worker_fails_what_runs_and_the_session_goes_on(model_folder: Path) -> None:
    async with (
        running_server(fake_model(model_folder, die_after=20, token_seconds=0.005)) as server,
        open_session(server) as session,
    ):
        await session.begin(1, text="abc", max_new_tokens=4000)
        assert await session.end_of(1) is UNAVAILABLE
        assert session.details(1)["ErrorInfo"].reason == "WORKER_UNAVAILABLE"
        await server.wait_until_serving()
        await session.begin(2, text="abc", max_new_tokens=3)
        assert await session.end_of(2) is OK


async def test_a_drain_finishes_what_runs_refuses_the_rest_and_ends_idle_sessions(model_folder: Path) -> None:
    async with (
        running_server(fake_model(model_folder, token_seconds=0.005)) as server,
        open_session(server) as idle,
        open_session(server) as busy,
    ):
        await idle.begin(1, text="abc", max_new_tokens=2)
        await idle.end_of(1)
        await busy.begin(1, text="abc", max_new_tokens=100)
        await busy.until_begun(1)
        drain = asyncio.create_task(server.server.drain(grace_seconds=20))
        assert await idle.end() is OK
        await busy.begin(2, text="abc")
        assert await busy.end_of(2) is UNAVAILABLE
        assert busy.details(2)["ErrorInfo"].reason == "SHUTTING_DOWN"
        assert not drain.done()
        assert await busy.end() is OK
        assert busy.ends[1] is OK
        async with asyncio.timeout(5):
            await drain


async def test_an_old_connection_takes_no_more_generations(model_folder: Path) -> None:
    model = fake_model(model_folder, token_seconds=0.01)
    async with running_server(model, max_connection_age_seconds=1) as server, open_session(server) as session:
        await session.begin(1, text="abc", max_new_tokens=200)
        await session.until_begun(1)
        await asyncio.sleep(1.2)
        await session.begin(2, text="abc")
        assert await session.end_of(2) is UNAVAILABLE
        assert session.details(2)["ErrorInfo"].reason == "SESSION_CLOSING"
        assert await session.end_of(1) is OK
        assert await session.end() is OK


async def test_a_session_needs_a_token(model_folder: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, ann=TOKEN)
    async with running_server(fake_model(model_folder), token_file=tokens) as server:
        async with open_session(server) as session:
            assert await session.end() is grpc.StatusCode.UNAUTHENTICATED
        async with open_session(server, TOKEN) as session:
            await session.begin(1, text="abc", max_new_tokens=2)
            assert await session.end_of(1) is OK


async def test_a_caller_that_reads_slowly_gets_more_tokens_in_an_event(model_folder: Path) -> None:
    wide = generation_pb2.OutputOptions(return_decisions=True)
    model = fake_model(model_folder, num_layers=32_768)  # 32 KiB a token
    async with running_server(model) as server:
        call = server.channel.stream_stream("/dash_api.v1.GenerationService/Session")()
        parameters = generation_request(text="abc", max_new_tokens=600, output=wide).parameters
        request = generation_pb2.SessionRequest(number=1)
        request.generate.parameters.CopyFrom(parameters)
        await call.write(request.SerializeToString())
        await server.wait_for_live_requests(1)
        await server.wait_for_live_requests(0)  # the worker is done, and nobody has read
        events = []
        while not events or not events[-1].HasField("finished"):
            events += [event.response for event in generation_pb2.SessionResponse.FromString(await call.read()).events]
        sizes = [len(event.delta.token_ids) for event in events]
        assert sum(sizes) == 600
        assert max(sizes) == 256
        assert bytes(token for event in events for token in event.delta.token_ids) == b"abc" * 200
        assert all(len(event.delta.actions) == size * 32_768 for event, size in zip(events, sizes, strict=True))
        call.cancel()


async def test_no_more_is_read_while_too_many_events_wait() -> None:
    outgoing = _Outgoing()
    for _ in range(2000):
        outgoing.add(1)
    reading = asyncio.create_task(outgoing.have_room())
    await asyncio.sleep(0)
    assert not reading.done()
    await outgoing.take()
    await reading


async def test_long_messages_are_split_between_events() -> None:
    message = generation_pb2.SessionResponse()
    assert list(_parts(message)) == []
    message.events.add(number=7)
    assert list(_parts(message)) == [message]
    message.Clear()
    for number in range(5):
        message.events.add(number=number).response.delta.text = "x" * 400_000
    assert [[event.number for event in part.events] for part in _parts(message)] == [[0, 1], [2, 3], [4]]
