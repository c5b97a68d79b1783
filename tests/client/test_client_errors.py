"""Failures reach the user as `DashError`s that say what to do."""

import pickle
from typing import Any

import grpc
import pytest
from fake_dash_server import HELLO, FakeDashServer, fail
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo

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


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_is_a_dash_error_from_every_call(code: grpc.StatusCode) -> None:
    expected = EXPECTED.get(code, ServerError)
    with FakeDashServer([fail(code, "it went wrong")]) as server, DashClient(server.target, retries=0) as client:
        with pytest.raises(DashError) as from_generate:
            client.generate("x")
        with pytest.raises(DashError) as from_stream:
            next(client.stream("x"))
        with pytest.raises(DashError) as from_started:
            _ = client.stream("x").started
        with pytest.raises(DashError) as from_final:
            client.stream("x").final()
    for caught in (from_generate, from_stream, from_started, from_final):
        assert type(caught.value) is expected
        assert caught.value.code == code.name
        assert not isinstance(caught.value, grpc.RpcError)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_wrong_fields_are_named() -> None:
    bad = BadRequest(
        field_violations=[
            BadRequest.FieldViolation(field="sampling.temperature", description="must be in [0, 100]"),
            BadRequest.FieldViolation(field="skip.mode", description="EXACT is not available"),
        ]
    )
    info = ErrorInfo(reason="INVALID_FIELD", domain="dash", metadata={"request_id": "r-9"})
    step = fail(grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature: must be in [0, 100]", bad, info)
    with (
        FakeDashServer([step]) as server,
        DashClient(server.target) as client,
        pytest.raises(InvalidArgumentError) as caught,
    ):
        client.generate("x")
    assert caught.value.field_violations == (
        FieldViolation("sampling.temperature", "must be in [0, 100]"),
        FieldViolation("skip.mode", "EXACT is not available"),
    )
    assert caught.value.reason == "INVALID_FIELD"
    assert caught.value.request_id == "r-9"
    assert str(caught.value) == ("sampling.temperature: must be in [0, 100]; skip.mode: EXACT is not available")


def test_a_full_server_says_when_to_come_back() -> None:
    retry = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    step = fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry, RequestInfo(request_id="r-7"))
    with (
        FakeDashServer([step]) as server,
        DashClient(server.target) as client,
        pytest.raises(ResourceExhaustedError, match="the queue is full") as caught,
    ):
        client.stream("x").final()
    assert caught.value.retry_after_seconds == 1.5
    assert caught.value.request_id == "r-7"


def test_a_failure_after_the_start_carries_the_request_id() -> None:
    died = fail(grpc.StatusCode.UNAVAILABLE, "the worker died", ErrorInfo(reason="WORKER_DIED"))
    script = [*HELLO[:2], died]
    with FakeDashServer(script) as server, DashClient(server.target) as client:
        stream = client.stream("x")
        assert next(stream).text == "Hel"
        for _ in range(2):
            with pytest.raises(UnavailableError, match="the worker died") as caught:
                next(stream)
            assert caught.value.request_id == "r-1"
            assert caught.value.reason == "WORKER_DIED"


def test_a_complete_answer_survives_a_late_failure() -> None:
    script = [*HELLO, fail(grpc.StatusCode.INTERNAL, "too late to matter")]
    with FakeDashServer(script) as server, DashClient(server.target) as client:
        assert client.stream("x").final().text == "Hello"


def test_no_server_says_how_to_start_one() -> None:
    with FakeDashServer() as server:
        pass
    with DashClient(server.target) as client:
        with pytest.raises(UnavailableError, match="make serve") as caught:
            client.health()
        assert server.target in caught.value.message
        with pytest.raises(UnavailableError, match="make serve"):
            client.stream("x").final()


def test_a_lost_connection_is_not_called_a_missing_server() -> None:
    with FakeDashServer() as server, DashClient(server.target) as client:
        server.script = [*HELLO[:2], server.wait]
        stream = client.stream("x")
        next(stream)
        server.stop()
        with pytest.raises(DashError) as caught:
            next(stream)
    assert "make serve" not in caught.value.message


@pytest.mark.parametrize("details", [b"\xff\xff\xff", b""])
def test_details_that_cannot_be_read_do_not_hide_the_error(details: bytes) -> None:
    def step(context: Any) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.INTERNAL, "the real trouble")

    with (
        FakeDashServer([step]) as server,
        DashClient(server.target) as client,
        pytest.raises(ServerError, match="the real trouble"),
    ):
        client.generate("x")


def test_an_unknown_name_is_not_found() -> None:
    with (
        FakeDashServer() as server,
        DashClient(server.target) as client,
        pytest.raises(NotFoundError, match="no policy is called 'x'"),
    ):
        client.policy_info("x")


def test_a_server_that_wants_a_token_says_where_it_is_given() -> None:
    step = fail(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed", ErrorInfo(reason="UNAUTHENTICATED"))
    with (
        FakeDashServer([step]) as server,
        DashClient(server.target) as client,
        pytest.raises(UnauthenticatedError, match="DASH_TOKEN") as caught,
    ):
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
