"""Calls of both clients against a real in-process server."""

import threading
import time
from dataclasses import replace

import grpc
import pytest
from client_colours import COLOURS, open_client
from fake_dash_server import HELLO, LAYER_COUNT, NOTE, Event, FakeDashServer, Script, delta, fail, finished, started

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_client import (
    Action,
    Audit,
    CancelledError,
    DashClient,
    DeadlineExceededError,
    Decisions,
    FinishReason,
    HealthStatus,
    InvalidArgumentError,
    Mode,
    NotFoundError,
    ServerError,
    SpeculationUsage,
    TokenLogprobs,
    UnavailableError,
)


def waiting(server: FakeDashServer) -> Script:
    """A generation that says something and never ends."""
    return [*HELLO[:2], server.wait]


def test_generate_and_a_drained_stream_agree(server: FakeDashServer, client: DashClient) -> None:
    whole = client.generate("x", temperature=0.5)
    with client.stream("x") as stream:
        pieces = list(stream)
    assert stream.final() == client.stream("x").final() == whole
    assert client.chat("x") == client.chat_stream("x").final() == whole
    assert "".join(piece.text for piece in pieces) == whole.text == "Hello"
    assert whole.token_ids == (10, 11, 12)
    assert whole.finish_reason is FinishReason.LENGTH
    assert whole.stop_string is None
    assert whole.started.mode is Mode.ADAPTIVE
    assert whole.started.policy_note == NOTE
    assert whole.started.compute_budget == 0.8
    assert server.requests[0].parameters.sampling.temperature == 0.5
    assert [request.parameters.WhichOneof("prompt") for request in server.requests] == ["text"] * 3 + ["chat"] * 2


def test_an_exact_answer_says_what_became_of_its_drafts(server: FakeDashServer, client: DashClient) -> None:
    speculation = generation_pb2.SpeculationUsage(
        drafted_token_count=8,
        accepted_token_count=6,
        wasted_token_count=2,
        verification_count=3,
        draft_seconds=0.5,
        verification_seconds=0.25,
    )
    usage = generation_pb2.Usage(output_token_count=3, speculation=speculation)
    assert client.generate("x").usage.speculation is None
    server.script = [started(mode=common_pb2.MODE_EXACT), *HELLO[1:-1], finished(usage=usage)]
    answer = client.generate("x", mode="exact", draft_length=4)
    sent = server.requests[-1].parameters
    assert (sent.skip.mode, sent.skip.draft_length) == (common_pb2.MODE_EXACT, 4)
    assert answer.started.mode is Mode.EXACT
    drafts = answer.usage.speculation
    assert drafts == SpeculationUsage(8, 6, 2, 3, 0.5, 0.25)
    assert drafts.acceptance_rate == 0.75


def test_speed_and_depth_are_per_decode_token(server: FakeDashServer, client: DashClient) -> None:
    answer = client.generate("x")
    assert answer.usage.decode_tokens_per_second == pytest.approx(20)
    assert answer.depth.mean_layers == {Action.SKIP: 2.0, Action.FULL: 2.0}
    assert answer.depth.mean_cost == 0.75
    server.script = [started(), delta("a", [1]), finished(tokens=1)]
    answer = client.generate("x")
    assert answer.usage.decode_tokens_per_second is None
    assert answer.depth.mean_layers == {}
    assert answer.depth.mean_cost is None


def test_decisions_have_a_row_per_token_and_a_column_per_layer(client: DashClient) -> None:
    decisions = client.generate("x", return_decisions=True).decisions
    assert decisions is not None
    assert decisions.shape == (3, LAYER_COUNT)
    assert decisions[2] == decisions[-1] == (Action.FULL, Action.SKIP, Action.INT4, Action.FULL)
    assert [decisions.layers_run(token) for token in range(3)] == [4, 2, 3]
    assert list(decisions[1:]) == [decisions[1], decisions[2]]
    with pytest.raises(IndexError):
        decisions[3]
    with pytest.raises(ValueError, match="rows of 4"):
        Decisions(b"\x01" * 5, 4)


def test_decisions_become_an_array_where_numpy_is_there() -> None:
    pytest.importorskip("numpy")
    array = Decisions(bytes([4, 1, 2, 4, 4, 4]), 3).to_numpy()
    assert array.tolist() == [[4, 1, 2], [4, 4, 4]]


def test_logprobs_are_one_entry_per_token(server: FakeDashServer, client: DashClient) -> None:
    entry = generation_pb2.TokenLogprobs(chosen=-0.5, top=[generation_pb2.TokenLogprob(token_id=1, logprob=-0.5)])
    server.script = [started(), delta("a", [1], logprobs=[entry]), delta("b", [2], logprobs=[entry]), finished(2)]
    assert client.generate("x", logprobs=1).logprobs == (TokenLogprobs(-0.5, ((1, -0.5),)),) * 2


def test_the_start_is_known_before_the_first_delta_and_loses_none(client: DashClient) -> None:
    with client.stream("x") as stream:
        assert stream.started.request_id == "r-1"
        assert next(stream).text == "Hel"
        assert stream.final().text == "Hello"


def test_breaking_out_of_a_stream_cancels_on_the_server(server: FakeDashServer, client: DashClient) -> None:
    server.script = waiting(server)
    with client.stream("x") as stream:
        for _ in stream:
            break
    assert server.cancelled.wait(30)
    with pytest.raises(CancelledError) as caught:
        stream.final()
    assert caught.value.request_id == "r-1"


def test_an_exception_in_the_loop_cancels_on_the_server(server: FakeDashServer, client: DashClient) -> None:
    def read_until_interrupted() -> None:
        with client.stream("x") as stream:
            next(stream)
            raise KeyboardInterrupt

    server.script = waiting(server)
    with pytest.raises(KeyboardInterrupt):
        read_until_interrupted()
    assert server.cancelled.wait(30)


def test_a_stream_that_is_over_is_not_cancelled(server: FakeDashServer, client: DashClient) -> None:
    with client.stream("x") as stream:
        stream.final()
    stream.cancel()
    assert stream.final().text == "Hello"
    assert list(stream) == []
    assert not server.cancelled.is_set()


def test_another_thread_or_task_may_cancel(server: FakeDashServer, client: DashClient) -> None:
    server.script = waiting(server)
    with client.stream("x") as stream:
        timer = threading.Timer(0.1, stream.cancel)
        timer.start()
        with pytest.raises(CancelledError):
            stream.final()
        timer.join()


def test_closing_the_client_ends_its_streams_and_refuses_new_calls(server: FakeDashServer, client: DashClient) -> None:
    server.script = waiting(server)
    stream = client.stream("x")
    next(stream)
    client.close()
    with pytest.raises(CancelledError):
        next(stream)
    with pytest.raises(CancelledError, match="closed"):
        client.generate("x")
    with pytest.raises(CancelledError, match="closed"):
        client.stream("x")


def test_a_stream_without_its_end_is_an_error(server: FakeDashServer, client: DashClient) -> None:
    server.script = HELLO[:-1]
    stream = client.stream("x")
    with pytest.raises(ServerError, match="without its end"):
        list(stream)
    with pytest.raises(ServerError, match="without its end"):
        stream.final()


@pytest.mark.parametrize(
    "script",
    [
        [delta("x", [1])],
        [finished()],
        [started(mode=common_pb2.MODE_UNSPECIFIED)],
        [started(), delta("x", [1], [4, 4, 4])],
        [started(), delta("x", [1], [4, 4, 4, 9])],
    ],
)
def test_messages_that_make_no_sense_are_a_server_error_and_end_the_call(
    server: FakeDashServer, client: DashClient, script: Script
) -> None:
    server.script = [*script, server.wait]
    with pytest.raises(ServerError, match="cannot read"):
        client.stream("x").final()
    assert server.cancelled.wait(30)


def test_a_finish_reason_newer_than_the_client_is_unknown(server: FakeDashServer, client: DashClient) -> None:
    server.script = [started(), delta("x", [1]), finished(reason=99, stop_string="")]
    answer = client.generate("x")
    assert answer.finish_reason is FinishReason.UNKNOWN
    assert answer.stop_string == ""


def test_facts_leave_out_what_is_newer_than_the_client(server: FakeDashServer, client: DashClient) -> None:
    model = client.model_info()
    policy = client.policy_info()
    client.policy_info("random")
    assert model.actions == (Action.SKIP, Action.INT4, Action.FULL)
    assert model.modes == (Mode.FULL_DEPTH, Mode.ADAPTIVE)
    assert policy.action_costs == {Action.SKIP: 0.1, Action.FULL: 1.0}
    assert policy.pinned_layers == (0, 3)
    assert not server.requests[1].HasField("name")
    assert server.requests[2].name == "random"
    with pytest.raises(NotFoundError, match="no policy is called 'x'"):
        client.policy_info("x")


def test_decisions_and_audits_are_asked_for_by_the_request(server: FakeDashServer, client: DashClient) -> None:
    server.decisions["r-1"] = model_pb2.GetDecisionsResponse(request_id="r-1", layer_count=4, mode=1)
    assert client.decisions("r-1").request_id == "r-1"
    with pytest.raises(NotFoundError, match="no decisions of that request"):
        client.decisions("r-2")
    assert client.audit("audited") == Audit("audited", "random", 0.5, 12, 0.75, -0.25, 0.125, None)
    with pytest.raises(NotFoundError):
        client.audit("another")


def test_several_answers_are_one_with_the_others_beside_it(server: FakeDashServer, client: DashClient) -> None:
    def numbered(index: int, event: Event) -> Event:
        numbered_event = Event(answer_index=index)
        numbered_event.MergeFrom(event)
        return numbered_event

    script = [
        numbered(0, started(request_id="r")),
        numbered(1, started(request_id="r-1")),
        numbered(1, delta("b", [2])),
        numbered(0, delta("a", [1])),
        numbered(1, finished(1)),
        numbered(0, finished(1)),
    ]
    server.script = script
    with client.stream("x", n=2) as stream:
        pieces = [(piece.answer_index, piece.text) for piece in stream]
    answer = stream.final()
    assert pieces == [(1, "b"), (0, "a")]
    assert (answer.text, [other.text for other in answer.others]) == ("a", ["b"])
    assert [other.started.request_id for other in answer.others] == ["r-1"]
    gone = fail(grpc.StatusCode.UNAVAILABLE, "gone")
    for cut_off in (script[:4], [script[0], script[3], script[5]]):  # the second one has begun, or not
        server.script = [*cut_off, gone]
        with pytest.raises(UnavailableError):
            client.stream("x", n=2).final()


def test_tokenize_takes_text_or_a_conversation(server: FakeDashServer, client: DashClient) -> None:
    assert client.tokenize("x") == (1, 2, 3)
    client.tokenize([{"role": "user", "content": "x"}])
    with pytest.raises(InvalidArgumentError, match="already"):
        client.tokenize([1, 2])
    assert [request.WhichOneof("prompt") for request in server.requests] == ["text", "chat"]


def test_waiting_ends_when_the_server_serves(server: FakeDashServer, client: DashClient) -> None:
    server.set_serving(False)
    assert client.health() is HealthStatus.NOT_SERVING
    with pytest.raises(UnavailableError, match="NOT_SERVING"):
        client.wait_until_ready(0.3)
    timer = threading.Timer(0.2, server.set_serving, [True])
    timer.start()
    client.wait_until_ready(5)
    timer.join()
    assert client.health() is HealthStatus.SERVING


@pytest.mark.parametrize("colour", COLOURS)
def test_waiting_finds_a_server_that_starts_later(gone: FakeDashServer, colour: str) -> None:
    with open_client(colour, gone.target) as client:
        with pytest.raises(UnavailableError, match="no server at"):
            client.wait_until_ready(0.3)
        with FakeDashServer(port=int(gone.target.rpartition(":")[2])):
            client.wait_until_ready(5)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_timeout_is_the_calls_or_the_clients(server: FakeDashServer, colour: str) -> None:
    with open_client(colour, timeout=0.2) as client:
        server.script = waiting(server)
        begin = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"0\.2 s"):
            client.stream("x").final()
        with pytest.raises(DeadlineExceededError, match=r"0\.1 s"):
            client.generate("x", timeout=0.1)
        assert time.monotonic() - begin < 5
        server.script = HELLO
        assert client.generate("x", timeout=float("inf")).text == "Hello"
        with pytest.raises(InvalidArgumentError, match="timeout"):
            client.generate("x", timeout=0)


def test_the_target_is_the_argument_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASH_TARGET", raising=False)
    with DashClient() as client:
        assert client.target == "localhost:50051"
    monkeypatch.setenv("DASH_TARGET", "elsewhere:1")
    with DashClient() as client:
        assert client.target == "elsewhere:1"
    with DashClient("here:2") as client:
        assert client.target == "here:2"
    with pytest.raises(InvalidArgumentError, match="web address"):
        DashClient("http://here:2")


def test_a_proxy_is_not_asked_for_this_machine(server: FakeDashServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://localhost:1")
    with DashClient(server.target) as client:
        assert client.health() is HealthStatus.SERVING


def test_results_are_frozen_and_comparable(client: DashClient) -> None:
    answer = client.generate("x")
    assert replace(answer, text="other") != answer
    with pytest.raises(AttributeError):
        answer.text = "other"  # type: ignore[misc]
