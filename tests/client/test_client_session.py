"""Sessions of both clients: many requests on one stream, none of which changes anything for another."""

import asyncio
import inspect
import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from client_colours import COLOURS, open_client
from fake_dash_server import HELLO, FakeDashServer, Script, delta, fail, finished, started
from fake_session import end_session
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from dash_client import (
    AsyncDashClient,
    AsyncSession,
    CancelledError,
    DashClient,
    DashError,
    DeadlineExceededError,
    Generation,
    InvalidArgumentError,
    Session,
    UnavailableError,
)

BYE = [started(request_id="r-2"), delta("Bye", [7], [4, 4, 4, 4]), finished(1)]


def answers(client: DashClient, prompts: Sequence[str]) -> list[Generation | DashError]:
    """Returns what each prompt's stream ended with, all begun at once in one session."""
    results: list[Generation | DashError] = []
    with client.session() as session:
        for stream in [session.stream(prompt) for prompt in prompts]:
            try:
                results.append(stream.final())
            except DashError as error:
                results.append(error)
    return results


def texts(results: Sequence[Generation | DashError]) -> list[str]:
    return [result.text if isinstance(result, Generation) else type(result).__name__ for result in results]


def test_both_sessions_have_methods_of_the_clients_with_the_same_arguments() -> None:
    def surface(kind: type) -> dict[str, Any]:
        names = [name for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"]
        return {name: inspect.signature(getattr(kind, name)).parameters for name in names}

    for session, client in ((Session, DashClient), (AsyncSession, AsyncDashClient)):
        assert surface(session).keys() == {"generate", "stream", "chat", "chat_stream", "close"}
        assert surface(session).items() <= surface(client).items()


def test_requests_of_a_session_have_the_answers_of_calls_and_share_one_stream(
    server: FakeDashServer, client: DashClient
) -> None:
    server.scripts["y"] = list(BYE)
    results = answers(client, ["x", "y", "x", "x"])
    assert results[0] == client.generate("x")
    assert texts(results) == ["Hello", "Bye", "Hello", "Hello"]
    assert server.num_sessions == 1


def test_a_failure_is_that_of_its_own_request_alone(server: FakeDashServer, client: DashClient) -> None:
    server.scripts["y"] = [fail(grpc.StatusCode.INTERNAL, "it went wrong")]
    assert texts(answers(client, ["x", "y", "x"])) == ["Hello", "ServerError", "Hello"]


def test_arguments_are_checked_before_anything_is_sent(server: FakeDashServer, client: DashClient) -> None:
    with client.session() as session, pytest.raises(InvalidArgumentError, match="top_p"):
        session.stream("x", top_p=2)
    assert server.num_sessions == 0


@pytest.mark.parametrize("colour", COLOURS)
def test_no_server_is_an_error_that_says_how_to_start_one(gone: FakeDashServer, colour: str) -> None:
    with open_client(colour, gone.target, retries=0) as client:
        (failed,) = answers(client, ["x"])
    assert isinstance(failed, UnavailableError)
    assert "make serve" in failed.message


def test_a_session_that_ends_takes_begun_requests_with_it_and_the_others_begin_anew(
    server: FakeDashServer, client: DashClient
) -> None:
    server.scripts["begun"] = [*HELLO[:2], lambda _: time.sleep(0.2), end_session]
    server.scripts["waits"] = [server.wait_once, *HELLO]
    begun, waited = answers(client, ["begun", "waits"])
    assert isinstance(begun, UnavailableError)
    assert begun.request_id == "r-1"
    assert "in the middle of the answer" in begun.message
    assert texts([waited]) == ["Hello"]
    assert server.num_sessions == 2


def test_the_deadline_is_kept_by_the_clients_clock_and_told_to_the_server(
    server: FakeDashServer, client: DashClient
) -> None:
    server.script = [server.wait]
    begin = time.monotonic()
    with client.session() as session, pytest.raises(DeadlineExceededError, match=r"within 0\.5 s"):
        session.generate("x", timeout=0.5)
    assert 0.4 < time.monotonic() - begin < 3
    assert server.cancelled.wait(1)
    assert server.timeouts == [pytest.approx(0.5, abs=0.1)]


async def test_a_cancelled_task_cancels_its_request(server: FakeDashServer) -> None:
    server.script = [server.wait]
    async with AsyncDashClient(server.target) as client, client.session() as session:
        task = asyncio.create_task(session.generate("x"))
        while not server.requests:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.cancelled.wait, 1)


def test_a_closed_session_cancels_what_runs_and_refuses_the_rest(server: FakeDashServer, client: DashClient) -> None:
    server.script = [*HELLO[:2], server.wait]
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


class RefusesOnce(FakeDashServer):
    """Plays `slow` for that prompt; refuses the first request for anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts["slow"] = [HELLO[0], lambda _: time.sleep(0.5), *HELLO[1:]]
        self._refusals: list[Script] = [[fail(grpc.StatusCode.UNAVAILABLE, "not now")]]

    def begin(self, request: Any, context: Any) -> Script:
        script = super().begin(request, context)
        return self._refusals.pop() if self._refusals and script is HELLO else script


@pytest.mark.parametrize("colour", COLOURS)
def test_a_stream_that_refuses_takes_no_more_but_finishes_what_runs(colour: str) -> None:
    with RefusesOnce() as server, open_client(colour, server.target) as client, client.session() as session:
        running = session.stream("slow")
        _ = running.started
        assert session.generate("refused once").text == "Hello"
        assert running.final().text == "Hello"
        assert server.num_sessions == 2


def test_each_request_belongs_to_the_span_that_is_open_when_it_begins(
    server: FakeDashServer, client: DashClient
) -> None:
    tracer = TracerProvider().get_tracer("test")
    spans = []
    with client.session() as session:
        for _ in range(2):
            with tracer.start_as_current_span("asks") as span:
                spans.append(trace.format_trace_id(span.get_span_context().trace_id))
                session.generate("x")
        session.generate("x")
    parents = [metadata.get("traceparent", "--").split("-")[1] for metadata in server.metadata]
    assert parents == [*spans, ""]
