"""Failures reach the user as `DashError`s that say what to do, from both clients."""

import pickle
from typing import Any

import grpc
import pytest
from client_colours import COLOURS, generate, open_client
from fake_dash_server import HELLO, FakeDashServer, fail
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo

from dash_client import (
    CancelledError,
    DashClient,
    DashError,
    DeadlineExceededError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)

EXPECTED: dict[grpc.StatusCode, type[DashError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}
FAILURES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


def in_one_session(client: DashClient) -> None:
    with client.session() as session:
        session.generate("x")


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("code", FAILURES)
def test_every_status_is_a_dash_error_from_every_call(
    server: FakeDashServer, colour: str, code: grpc.StatusCode
) -> None:
    server.script = [fail(code, "it went wrong", RequestInfo(request_id="r-7"), pause_ms=1500)]
    with open_client(colour, server.target, retries=0) as client:
        for call in (
            generate,
            lambda client: next(client.stream("x")),
            lambda client: client.stream("x").started,
            lambda client: client.stream("x").final(),
            in_one_session,
        ):
            with pytest.raises(DashError, match="it went wrong") as caught:
                call(client)
            assert type(caught.value) is EXPECTED.get(code, ServerError)
            assert caught.value.code == code.name
            assert (caught.value.retry_after_seconds, caught.value.request_id) == (1.5, "r-7")
            assert not isinstance(caught.value, grpc.RpcError)
            assert caught.value.__cause__ is None
            assert caught.value.__suppress_context__


def test_wrong_fields_are_named(server: FakeDashServer, client: DashClient) -> None:
    bad = BadRequest(
        field_violations=[
            BadRequest.FieldViolation(field="sampling.temperature", description="must be in [0, 100]"),
            BadRequest.FieldViolation(field="skip.mode", description="EXACT is not available"),
        ]
    )
    info = ErrorInfo(reason="INVALID_FIELD", domain="dash", metadata={"request_id": "r-9"})
    server.script = [fail(grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature: must be in [0, 100]", bad, info)]
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate("x")
    assert caught.value.field_violations == (
        FieldViolation("sampling.temperature", "must be in [0, 100]"),
        FieldViolation("skip.mode", "EXACT is not available"),
    )
    assert caught.value.reason == "INVALID_FIELD"
    assert caught.value.request_id == "r-9"
    assert str(caught.value) == ("sampling.temperature: must be in [0, 100]; skip.mode: EXACT is not available")


def test_a_failure_after_the_start_carries_the_request_id_and_comes_again(
    server: FakeDashServer, client: DashClient
) -> None:
    died = fail(grpc.StatusCode.UNAVAILABLE, "the worker died", ErrorInfo(reason="WORKER_DIED"))
    server.script = [*HELLO[:2], died]
    stream = client.stream("x")
    assert next(stream).text == "Hel"
    for _ in range(2):
        with pytest.raises(UnavailableError, match="the worker died") as caught:
            next(stream)
        assert caught.value.request_id == "r-1"
        assert caught.value.reason == "WORKER_DIED"


def test_a_complete_answer_survives_a_late_failure(server: FakeDashServer, client: DashClient) -> None:
    server.script = [*HELLO, fail(grpc.StatusCode.INTERNAL, "too late to matter")]
    assert client.stream("x").final().text == "Hello"


def test_a_lost_connection_is_not_called_a_missing_server(server: FakeDashServer, client: DashClient) -> None:
    server.script = [*HELLO[:2], server.wait]
    stream = client.stream("x")
    next(stream)
    server.stop()
    with pytest.raises(DashError) as caught:
        next(stream)
    assert "make serve" not in caught.value.message


@pytest.mark.parametrize("details", [b"\xff\xff\xff", b""])
def test_details_that_cannot_be_read_do_not_hide_the_error(
    server: FakeDashServer, client: DashClient, details: bytes
) -> None:
    def step(context: Any) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.INTERNAL, "the real trouble")

    server.script = [step]
    with pytest.raises(ServerError, match="the real trouble"):
        client.generate("x")


def test_a_server_that_wants_a_token_says_where_it_is_given(server: FakeDashServer, client: DashClient) -> None:
    reason = ErrorInfo(reason="UNAUTHENTICATED")
    server.script = [fail(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed", reason)]
    with pytest.raises(UnauthenticatedError, match="DASH_TOKEN") as caught:
        client.generate("x")
    assert caught.value.reason == "UNAUTHENTICATED"
    assert len(server.requests) == 1


def test_errors_go_from_process_to_process_whole() -> None:
    error = ResourceExhaustedError(
        "full", code="RESOURCE_EXHAUSTED", request_id="r-1", retry_after_seconds=1.5, field_violations=()
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ResourceExhaustedError
    assert vars(copy) == vars(error)
    assert str(copy) == "full"
