"""Sessions of both clients: many requests on one stream, none of which changes anything for another."""

import asyncio
import gc
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from client_colours import COLOURS, with_client
from fake_dash_server import HELLO, FakeDashServer, delta, fail, finished, started
from fake_session import end_session
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from test_client_errors import EXPECTED

from dash_client import (
    AsyncDashClient,
    AsyncSession,
    CancelledError,
    DashClient,
    DashError,
    DeadlineExceededError,
    Generation,
    InvalidArgumentError,
    ServerError,
    Session,
    UnavailableError,
)

BOTH = pytest.mark.parametrize("colour", COLOURS)
AT_ONCE = RetryInfo(retry_delay=Duration(nanos=1_000_000))
BYE = [started(request_id="r-2"), delta("Bye", [7], [4, 4, 4, 4]), finished(1)]


def answers(
    colour: str, target: str, prompts: Sequence[str], timeout: float | None = None, **options: Any
) -> list[Generation | DashError]:
    """Returns what each prompt's stream ended with, all begun at once in one session of a new client."""

    def read(client: DashClient) -> list[Generation | DashError]:
        with client.session() as session:
            streams = [session.stream(prompt, timeout=timeout) for prompt in prompts]
            return [_outcome(stream.final) for stream in streams]

    async def read_async(client: AsyncDashClient) -> list[Any]:
        async with client.session() as session:
            calls = [session.generate(prompt, timeout=timeout) for prompt in prompts]
            return await asyncio.gather(*calls, return_exceptions=True)

    results = with_client(colour, target, read, read_async, **options)
    assert all(isinstance(result, Generation | DashError) for result in results), results
    return list(results)


def _outcome(function: Callable[[], Generation]) -> Generation | DashError:
    try:
        return function()
    except DashError as error:
        return error


def texts(results: Sequence[Generation | DashError]) -> list[str]:
    return [result.text if isinstance(result, Generation) else type(result).__name__ for result in results]


def test_both_sessions_have_methods_of_the_clients_with_the_same_arguments() -> None:
    def surface(kind: type) -> dict[str, Any]:
        names = [name for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"]
        return {name: inspect.signature(getattr(kind, name)).parameters for name in names}

    for session, client in ((Session, DashClient), (AsyncSession, AsyncDashClient)):
        assert surface(session).keys() == {"generate", "stream", "chat", "chat_stream", "close"}
        assert surface(session).items() <= surface(client).items()


@BOTH
def test_requests_of_a_session_have_the_answers_of_calls_and_share_one_stream(colour: str) -> None:
    with FakeDashServer() as server:
        server.scripts["y"] = list(BYE)
        results = answers(colour, server.target, ["x", "y", "x", "x"])
        with DashClient(server.target) as client:
            assert results[0] == client.generate("x")
    assert texts(results) == ["Hello", "Bye", "Hello", "Hello"]
    assert server.num_sessions == 1


@BOTH
@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_failure_is_that_of_a_call_and_of_its_own_request_alone(colour: str, code: grpc.StatusCode) -> None:
    with FakeDashServer() as server:
        server.scripts["y"] = [fail(code, "it went wrong", RetryInfo(retry_delay=Duration(seconds=1)))]
        first, failed, third = answers(colour, server.target, ["x", "y", "x"], retries=0)
    assert texts([first, third]) == ["Hello", "Hello"]
    assert type(failed) is EXPECTED.get(code, ServerError)
    assert failed.code == code.name
    assert failed.retry_after_seconds == 1
    assert failed.__cause__ is None
    assert failed.__suppress_context__


@BOTH
def test_arguments_are_checked_before_anything_is_sent(colour: str) -> None:
    def use(client: DashClient) -> None:
        with client.session() as session, pytest.raises(InvalidArgumentError, match="top_p"):
            session.stream("x", top_p=2)

    async def use_async(client: AsyncDashClient) -> None:
        async with client.session() as session:
            with pytest.raises(InvalidArgumentError, match="top_p"):
                session.stream("x", top_p=2)

    with FakeDashServer() as server:
        with_client(colour, server.target, use, use_async)
    assert server.num_sessions == 0


class Refusals(FakeDashServer):
    """Refuses the first requests with these codes."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        super().__init__()
        self._codes = list(codes)
        self.script = [self._refuse, *HELLO]

    def _refuse(self, context: Any) -> None:
        if self._codes:
            fail(self._codes.pop(0), "not now", AT_ONCE)(context)


@BOTH
@pytest.mark.parametrize(
    ("code", "num_sessions"),
    [
        (grpc.StatusCode.UNAVAILABLE, 2),  # by a new stream, which may lead to another server
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.CANCELLED, 1),
    ],
)
def test_a_refusal_is_tried_again(colour: str, code: grpc.StatusCode, num_sessions: int) -> None:
    with Refusals(code) as server:
        assert texts(answers(colour, server.target, ["x"])) == ["Hello"]
    assert len(server.requests) == 2
    assert server.num_sessions == num_sessions


@BOTH
@pytest.mark.parametrize(("retries", "attempts"), [(False, 1), (1, 2), (True, 4)])
def test_the_caller_says_how_often(colour: str, retries: bool | int, attempts: int) -> None:
    with Refusals(*[grpc.StatusCode.RESOURCE_EXHAUSTED] * 9) as server:
        assert texts(answers(colour, server.target, ["x"], retries=retries)) == ["ResourceExhaustedError"]
    assert len(server.requests) == attempts


@BOTH
def test_no_server_is_an_error_that_says_how_to_start_one(colour: str) -> None:
    with FakeDashServer() as server:
        pass
    (failed,) = answers(colour, server.target, ["x"], retries=0)
    assert isinstance(failed, UnavailableError)
    assert "make serve" in failed.message


@BOTH
def test_a_session_that_ends_takes_begun_requests_with_it_and_the_others_begin_anew(colour: str) -> None:
    with FakeDashServer() as server:
        server.scripts["begun"] = [*HELLO[:2], lambda _: time.sleep(0.2), end_session]
        server.scripts["waits"] = [server.wait_once, *HELLO]
        begun, waited = answers(colour, server.target, ["begun", "waits"])
    assert isinstance(begun, UnavailableError)
    assert begun.request_id == "r-1"
    assert "in the middle of the answer" in begun.message
    assert texts([waited]) == ["Hello"]
    assert server.num_sessions == 2


@BOTH
def test_a_request_that_was_begun_is_not_tried_again(colour: str) -> None:
    with FakeDashServer([HELLO[0], fail(grpc.StatusCode.UNAVAILABLE, "the worker died", AT_ONCE)]) as server:
        (failed,) = answers(colour, server.target, ["x"])
    assert isinstance(failed, UnavailableError)
    assert failed.request_id == "r-1"
    assert len(server.requests) == 1


@BOTH
def test_the_deadline_is_kept_by_the_clients_clock_and_told_to_the_server(colour: str) -> None:
    with FakeDashServer() as server:
        server.script = [server.wait]
        begin = time.monotonic()
        (failed,) = answers(colour, server.target, ["x"], timeout=0.5)
        assert 0.4 < time.monotonic() - begin < 3
        assert isinstance(failed, DeadlineExceededError)
        assert "within 0.5 s" in failed.message
        assert server.cancelled.wait(1)
    assert server.timeouts == [pytest.approx(0.5, abs=0.1)]


@BOTH
def test_the_deadline_is_that_of_all_attempts(colour: str) -> None:
    later = RetryInfo(retry_delay=Duration(seconds=10))
    with FakeDashServer([fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", later)]) as server:
        begin = time.monotonic()
        assert texts(answers(colour, server.target, ["x"], timeout=0.5)) == ["DeadlineExceededError"]
        assert time.monotonic() - begin < 3


def test_a_dropped_stream_is_cancelled_and_the_others_go_on() -> None:
    with FakeDashServer() as server, DashClient(server.target) as client, client.session() as session:
        server.scripts["endless"] = [*HELLO[:2], server.wait]
        stream = session.stream("endless")
        assert next(stream).text == "Hel"
        del stream
        gc.collect()
        assert server.cancelled.wait(1)
        assert session.generate("x").text == "Hello"
    assert server.num_sessions == 1


async def test_a_dropped_async_stream_is_cancelled_and_the_others_go_on() -> None:
    with FakeDashServer() as server:
        async with AsyncDashClient(server.target) as client, client.session() as session:
            server.scripts["endless"] = [*HELLO[:2], server.wait]
            async for _ in session.stream("endless"):
                break
            assert await asyncio.to_thread(server.cancelled.wait, 1)
            assert (await session.generate("x")).text == "Hello"
    assert server.num_sessions == 1


async def test_a_cancelled_task_cancels_its_request() -> None:
    with FakeDashServer() as server:
        server.script = [server.wait]
        async with AsyncDashClient(server.target) as client, client.session() as session:
            task = asyncio.create_task(session.generate("x"))
            while not server.requests:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.cancelled.wait, 1)


@BOTH
def test_a_closed_session_cancels_what_runs_and_refuses_the_rest(colour: str) -> None:
    def use(client: DashClient) -> None:
        with client.session() as session:
            stream = session.stream("x")
            assert next(stream).text == "Hel"
        with pytest.raises(CancelledError):
            stream.final()
        with pytest.raises(CancelledError, match="session is closed"):
            session.stream("x")
        with client.session() as session:
            client.close()
            with pytest.raises(CancelledError, match="client is closed"):
                session.stream("x")

    async def use_async(client: AsyncDashClient) -> None:
        async with client.session() as session:
            stream = session.stream("x")
            assert (await anext(stream)).text == "Hel"
        with pytest.raises(CancelledError):
            await stream.final()
        with pytest.raises(CancelledError, match="session is closed"):
            session.stream("x")
        async with client.session() as session:
            await client.close()
            with pytest.raises(CancelledError, match="client is closed"):
                session.stream("x")

    with FakeDashServer() as server:
        server.script = [*HELLO[:2], server.wait]
        with_client(colour, server.target, use, use_async)


@BOTH
def test_a_stream_that_refuses_takes_no_more_but_finishes_what_runs(colour: str) -> None:
    def use(client: DashClient) -> list[str]:
        with client.session() as session:
            running = session.stream("slow")
            _ = running.started
            return [session.generate("refused once").text, running.final().text]

    async def use_async(client: AsyncDashClient) -> list[str]:
        async with client.session() as session:
            running = session.stream("slow")
            await running.started()
            return [(await session.generate("refused once")).text, (await running.final()).text]

    with Refusals(grpc.StatusCode.UNAVAILABLE) as server:
        server.scripts["slow"] = [HELLO[0], lambda _: time.sleep(0.5), *HELLO[1:]]
        assert with_client(colour, server.target, use, use_async) == ["Hello", "Hello"]
    assert server.num_sessions == 2


@BOTH
def test_each_request_belongs_to_the_span_that_is_open_when_it_begins(colour: str) -> None:
    tracer = TracerProvider().get_tracer("test")

    def use(client: DashClient) -> list[str]:
        with client.session() as session:
            spans = []
            for _ in range(2):
                with tracer.start_as_current_span("asks") as span:
                    spans.append(trace.format_trace_id(span.get_span_context().trace_id))
                    session.generate("x")
            session.generate("x")
            return spans

    async def use_async(client: AsyncDashClient) -> list[str]:
        async with client.session() as session:
            spans = []
            for _ in range(2):
                with tracer.start_as_current_span("asks") as span:
                    spans.append(trace.format_trace_id(span.get_span_context().trace_id))
                    await session.generate("x")
            await session.generate("x")
            return spans

    with FakeDashServer() as server:
        first, second = with_client(colour, server.target, use, use_async)
    parents = [metadata.get("traceparent", "--").split("-")[1] for metadata in server.metadata]
    assert parents == [first, second, ""]
