"""Retries: only before the first headers, at the time that the server asks for, as often as the caller allows."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from client_colours import COLOURS, drain, generate
from fake_dash_server import HELLO, FakeDashServer, Script

from dash_client import (
    DashClient,
    DashError,
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)

CALLS: list[Callable[..., Any]] = [generate, drain]
BOTH = pytest.mark.parametrize("colour", COLOURS)


def refuse(code: grpc.StatusCode, pushback_ms: str | None = None) -> Callable[[grpc.ServicerContext], None]:
    def step(context: grpc.ServicerContext) -> None:
        if pushback_ms is not None:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback_ms),))
        context.abort(code, "not now")

    return step


class Attempts(FakeDashServer):
    """Plays one script for each attempt, and the last one for all later attempts; records their times."""

    def __init__(self, *scripts: Script) -> None:
        super().__init__()
        self._scripts = list(scripts)
        self.times: list[float] = []

    def _record(self, request: Any, context: grpc.ServicerContext) -> None:
        super()._record(request, context)
        self.times.append(time.monotonic())
        self.script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]


@BOTH
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED]
)
def test_a_refusal_is_tried_again(colour: str, call: Callable[..., Any], code: grpc.StatusCode) -> None:
    with Attempts([refuse(code)], HELLO) as server:
        assert call(colour, server.target).text == "Hello"
    assert len(server.requests) == 2


@BOTH
def test_the_server_says_when_to_come_back(colour: str) -> None:
    later = [refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "700")]
    at_once = [refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "1")]
    with Attempts(later, at_once, HELLO) as server:
        assert drain(colour, server.target).text == "Hello"
    first, second, third = server.times
    assert second - first == pytest.approx(0.7, abs=0.3)
    # gRPC's own pause would be a third of a second here.
    assert third - second < 0.25


@BOTH
def test_a_server_may_forbid_it(colour: str) -> None:
    with Attempts([refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "-1")]) as server, pytest.raises(ResourceExhaustedError):
        generate(colour, server.target)
    assert len(server.requests) == 1


@BOTH
def test_nothing_is_tried_again_in_the_middle_of_a_stream(colour: str) -> None:
    with Attempts([HELLO[0], refuse(grpc.StatusCode.UNAVAILABLE, "1")], HELLO) as server:
        with pytest.raises(UnavailableError) as caught:
            drain(colour, server.target)
        assert caught.value.request_id == "r-1"
    assert len(server.requests) == 1


@BOTH
def test_a_slot_that_was_granted_is_the_end_of_it_even_before_a_message(colour: str) -> None:
    def grant(context: grpc.ServicerContext) -> None:
        context.send_initial_metadata(())

    def wait(_: grpc.ServicerContext) -> None:
        time.sleep(0.3)  # gRPC ignores headers that come together with the status

    script: Script = [grant, wait, refuse(grpc.StatusCode.UNAVAILABLE, "1")]
    with Attempts(script, HELLO) as server, pytest.raises(UnavailableError):
        drain(colour, server.target)
    assert len(server.requests) == 1


@BOTH
@pytest.mark.parametrize("call", CALLS)
def test_the_deadline_is_that_of_all_attempts(colour: str, call: Callable[..., Any]) -> None:
    begin = time.monotonic()
    with Attempts([refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "10000")]) as server:
        with pytest.raises(DeadlineExceededError, match=r"0\.5 s"):
            call(colour, server.target, timeout=0.5)
        assert time.monotonic() - begin < 3
    assert len(server.requests) == 1


@BOTH
@pytest.mark.parametrize(("retries", "attempts"), [(False, 1), (0, 1), (1, 2), (True, 4), (4, 5)])
def test_the_caller_says_how_often(colour: str, retries: bool | int, attempts: int) -> None:
    with Attempts([refuse(grpc.StatusCode.UNAVAILABLE, "1")]) as server:
        with pytest.raises(UnavailableError):
            generate(colour, server.target, retries=retries)
        assert len(server.requests) == attempts


def test_other_errors_are_final() -> None:
    with Attempts([refuse(grpc.StatusCode.INTERNAL, "1")]) as server:
        with DashClient(server.target) as client, pytest.raises(DashError):
            client.generate("x")
        assert len(server.requests) == 1


def test_health_is_what_it_is_now() -> None:
    with FakeDashServer() as server:
        pass
    begin = time.monotonic()
    with DashClient(server.target) as client, pytest.raises(UnavailableError):
        client.health()
    assert time.monotonic() - begin < 0.2


@pytest.mark.parametrize("retries", [-1, 5, 1.5, "3", None])
def test_a_number_that_grpc_does_not_take_is_refused(retries: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="retries"):
        DashClient(retries=retries)
