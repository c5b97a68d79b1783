"""Retries: only before the first headers, at the time that the server asks for, as often as the caller allows."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from client_colours import CALLS, COLOURS, drain, generate, in_session, open_client
from fake_dash_server import HELLO, FakeDashServer, Script, fail

from dash_client import (
    DashClient,
    DashError,
    DeadlineExceededError,
    Generation,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)

BOTH = pytest.mark.parametrize("colour", COLOURS)
ALL_CALLS = pytest.mark.parametrize("call", CALLS)
Ask = Callable[..., Generation]


def refuse(code: grpc.StatusCode, pause_ms: int) -> Callable[[grpc.ServicerContext], None]:
    return fail(code, "not now", pause_ms=pause_ms)


class Attempts(FakeDashServer):
    """Plays one script for each attempt, and the last one for all later attempts; records their times."""

    def __init__(self, *scripts: Script) -> None:
        super().__init__()
        self._scripts = list(scripts)
        self.times: list[float] = []

    def begin(self, request: Any, context: Any) -> Script:
        super().begin(request, context)
        self.times.append(time.monotonic())
        return self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]


def ask(call: Ask, colour: str, server: FakeDashServer, timeout: float | None = None, **options: Any) -> Generation:
    with open_client(colour, server.target, **options) as client:
        return call(client, timeout=timeout)


@BOTH
@ALL_CALLS
@pytest.mark.parametrize(
    ("code", "num_sessions"),
    [
        (grpc.StatusCode.UNAVAILABLE, 2),  # by a new stream, which may lead to another server
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.CANCELLED, 1),
    ],
)
def test_a_refusal_is_tried_again(colour: str, call: Ask, code: grpc.StatusCode, num_sessions: int) -> None:
    with Attempts([refuse(code, 1)], HELLO) as server:
        assert ask(call, colour, server).text == "Hello"
    assert len(server.requests) == 2
    assert server.num_sessions == (num_sessions if call is in_session else 0)


@BOTH
@pytest.mark.parametrize("call", [drain, in_session])
def test_the_server_says_when_to_come_back(colour: str, call: Ask) -> None:
    later = [refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, 700)]
    at_once = [refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, 1)]
    with Attempts(later, at_once, HELLO) as server:
        assert ask(call, colour, server).text == "Hello"
    first, second, third = server.times
    assert second - first == pytest.approx(0.7, abs=0.3)
    # gRPC's own pause would be a third of a second here.
    assert third - second < 0.25


@BOTH
def test_a_server_may_forbid_it(colour: str) -> None:
    with Attempts([refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, -1)]) as server, pytest.raises(ResourceExhaustedError):
        ask(generate, colour, server)
    assert len(server.requests) == 1


@BOTH
@pytest.mark.parametrize("call", [drain, in_session])
def test_nothing_is_tried_again_in_the_middle_of_a_stream(colour: str, call: Ask) -> None:
    with Attempts([HELLO[0], refuse(grpc.StatusCode.UNAVAILABLE, 1)], HELLO) as server:
        with pytest.raises(UnavailableError) as caught:
            ask(call, colour, server)
        assert caught.value.request_id == "r-1"
    assert len(server.requests) == 1


@BOTH
def test_a_slot_that_was_granted_is_the_end_of_it_even_before_a_message(colour: str) -> None:
    def grant(context: grpc.ServicerContext) -> None:
        context.send_initial_metadata(())

    def wait(_: grpc.ServicerContext) -> None:
        time.sleep(0.3)  # gRPC ignores headers that come together with the status

    script: Script = [grant, wait, refuse(grpc.StatusCode.UNAVAILABLE, 1)]
    with Attempts(script, HELLO) as server, pytest.raises(UnavailableError):
        ask(drain, colour, server)
    assert len(server.requests) == 1


@BOTH
@ALL_CALLS
def test_the_deadline_is_that_of_all_attempts(colour: str, call: Ask) -> None:
    begin = time.monotonic()
    with Attempts([refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, 10_000)]) as server:
        with pytest.raises(DeadlineExceededError, match=r"0\.5 s"):
            ask(call, colour, server, timeout=0.5)
        assert time.monotonic() - begin < 3
    assert len(server.requests) == 1


@BOTH
@pytest.mark.parametrize("call", [generate, in_session])
@pytest.mark.parametrize(("retries", "attempts"), [(False, 1), (0, 1), (1, 2), (True, 4), (4, 5)])
def test_the_caller_says_how_often(colour: str, call: Ask, retries: bool | int, attempts: int) -> None:
    with Attempts([refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, 1)]) as server:
        with pytest.raises(ResourceExhaustedError):
            ask(call, colour, server, retries=retries)
        assert len(server.requests) == attempts


def test_other_errors_are_final() -> None:
    with Attempts([refuse(grpc.StatusCode.INTERNAL, 1)]) as server:
        with pytest.raises(DashError):
            ask(generate, "sync", server)
        assert len(server.requests) == 1


def test_health_is_what_it_is_now(gone: FakeDashServer) -> None:
    begin = time.monotonic()
    with DashClient(gone.target) as client, pytest.raises(UnavailableError):
        client.health()
    assert time.monotonic() - begin < 0.2


@pytest.mark.parametrize("retries", [-1, 5, 1.5, "3", None])
def test_a_number_that_grpc_does_not_take_is_refused(retries: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="retries"):
        DashClient(retries=retries)
