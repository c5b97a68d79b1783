"""Recorded decisions: from the server, to a file and back, and the trace command."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import trace_samples as samples
from command_runs import Command
from fake_dash_server import FakeDashServer
from google.protobuf import json_format

from dash_api.v1 import model_pb2
from dash_client import Action, DashClient, Mode, ServerError, StepKind
from dash_client.trace.decision_trace_files import load_decisions, save_decisions
from dash_client.trace.decision_trace_messages import recorded_decisions

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture
def server(server: FakeDashServer) -> FakeDashServer:
    """A server that holds a request's decisions."""
    server.decisions["r-1"] = samples.small()
    return server


def test_recorded_decisions_are_plain_values(server: FakeDashServer) -> None:
    sent = server.decisions["r-1"]
    with DashClient() as client:
        decisions = client.decisions("r-1")
    assert server.requests[-1] == model_pb2.GetDecisionsRequest(request_id="r-1")
    assert (decisions.request_id, decisions.mode, decisions.compute_budget) == ("r-1", Mode.ADAPTIVE, 0.6)
    assert (decisions.layer_count, decisions.pinned_layers) == (4, (0, 3))
    assert decisions.score_actions == (Action.SKIP, Action.INT4, Action.INT8, Action.FULL)
    step, first = decisions.steps[0], sent.steps[0]
    assert step.kind is StepKind.DECODE
    assert step.token_ids == tuple(first.token_ids)
    assert (step.start_unix_ns, step.duration_ns) == (first.start_unix_nanos, first.duration_nanos)
    assert step.accepted_token_count is None
    assert [layer.action for layer in step.layers] == [Action(number) for number in first.actions]
    assert [layer.decision is None for layer in step.layers] == [True, False, False, True]
    layer = step.layers[1]
    assert layer.decision is not None
    assert layer.decision.start_ns == first.decision_start_nanos[1]
    assert layer.decision.end_ns == first.decision_end_nanos[1]
    assert layer.decision.scores == dict(zip(decisions.score_actions, first.scores[4:8], strict=True))
    assert (layer.start_ns, layer.end_ns) == (first.layer_start_nanos[1], first.layer_end_nanos[1])
    assert layer.exposed_ns == first.exposed_nanos[1]
    assert layer.cost_spent == pytest.approx(0.0283)
    with pytest.raises(FrozenInstanceError):
        step.duration_ns = 0  # type: ignore[misc]


def test_a_verification_has_no_layers() -> None:
    decisions = recorded_decisions(samples.exact())
    assert [step.kind.value for step in decisions.steps[:4]] == ["draft", "draft", "draft", "verification"]
    verification = decisions.steps[3]
    assert verification.layers == ()
    assert verification.accepted_token_count == 3
    assert len(verification.token_ids) == 4
    assert decisions.unrecorded_step_count == 9


def test_a_policy_without_scores_has_none() -> None:
    message = samples.small(score_actions=[])
    for step in message.steps:
        step.ClearField("scores")
    decision = recorded_decisions(message).steps[0].layers[1].decision
    assert decision is not None
    assert decision.scores is None


def _without(name: str) -> Callable[[model_pb2.GetDecisionsResponse], None]:
    return lambda message: message.steps[0].ClearField(name)


def _with(**values: Any) -> Callable[[model_pb2.GetDecisionsResponse], None]:
    def change(message: model_pb2.GetDecisionsResponse) -> None:
        for name, value in values.items():
            if isinstance(value, list):
                message.ClearField(name)
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)

    return change


UNREADABLE = {
    "no request id": _with(request_id=""),
    "no mode": _with(mode=0),
    "a newer mode": _with(mode=99),
    "no layers": _with(layer_count=0),
    "far too many layers": _with(layer_count=4_000_000_000),
    "other layers": _with(layer_count=5),
    "a pinned layer beyond the last": _with(pinned_layers=[4]),
    "a newer action": _with(score_actions=[1, 2, 3, 9]),
    "fewer scores": _with(score_actions=[1, 2]),
    "no actions": _without("actions"),
    "no layer times": _without("layer_end_nanos"),
    "no kind": _without("kind"),
    "an action 0": lambda message: setattr(message.steps[0], "actions", b"\x04\x00\x04\x04"),
    "half of the costs": lambda message: message.steps[0].cost_spent.pop(),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_what_does_not_fit_together_is_unreadable(change: Callable[[Any], None], server: FakeDashServer) -> None:
    change(server.decisions["r-1"])
    with DashClient() as client, pytest.raises(ServerError, match="cannot read"):
        client.decisions("r-1")


@pytest.mark.parametrize("message", [samples.small(), samples.exact(), samples.small(steps=[])])
def test_a_file_gives_back_what_was_saved(message: model_pb2.GetDecisionsResponse, tmp_path: Path) -> None:
    decisions = recorded_decisions(message)
    path = tmp_path / "decisions.json"
    save_decisions(decisions, path)
    assert load_decisions(path) == decisions
    assert json_format.Parse(path.read_text(), model_pb2.GetDecisionsResponse()) == message


def test_the_command_writes_a_page_and_the_recording(server: FakeDashServer, tmp_path: Path, command: Command) -> None:
    assert command("trace r-1 --save kept.json") == ("trace-r-1.html\n", "")
    page = (tmp_path / "trace-r-1.html").read_text()
    assert "smollm2-135m-four-actions" in page
    server.stop()
    assert command("trace kept.json --output again.html").out == "again.html\n"
    assert (tmp_path / "again.html").read_text() == page


def test_the_page_stays_in_the_working_folder_whatever_the_request_is_called(
    server: FakeDashServer, tmp_path: Path, command: Command
) -> None:
    server.decisions["r-1"].request_id = "../../etc/a b\x1b[0m"
    assert command("trace r-1").out == "trace-_etc_a_b_0m.html\n"
    assert [path.name for path in tmp_path.iterdir()] == ["trace-_etc_a_b_0m.html"]


def test_generate_says_how_to_ask_for_its_trace(server: FakeDashServer, command: Command) -> None:
    assert command("generate x").err.rstrip().endswith("request r-1")


@pytest.mark.parametrize("name", ["no-such.json", "folder/r-1", ".", "", "x/" + "a" * 5_000])
def test_a_wrong_file_name_is_not_sent_to_the_server(name: str, server: FakeDashServer, command: Command) -> None:
    assert "file" in command("trace", name, code=2).err
    assert server.requests == []


def test_the_servers_refusals_are_exit_codes(server: FakeDashServer, command: Command) -> None:
    assert command("trace r-2", code=1).err == "dash-client: no decisions of that request of yours are held\n"
    command("trace", "a" * 300, code=1)
