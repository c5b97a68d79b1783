"""dash-client bench: the load that it puts on a server, and the figures that it computes."""

import itertools
import json
import signal
import threading

import grpc
from command_runs import Command, run_command
from fake_dash_server import HELLO, FakeDashServer, fail, finished

from dash_api.v1 import generation_pb2
from dash_client.commands.bench_figures import Sample, figures, histogram, percentiles
from dash_client.types import SpeculationUsage


def test_percentiles_are_interpolated() -> None:
    found = percentiles(range(101))
    assert found is not None
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)
    single = percentiles([7])
    assert single is not None
    assert (single.p50, single.p90, single.p99) == (7, 7, 7)
    assert percentiles([]) is None


def test_figures_count_only_complete_answers_and_name_the_errors() -> None:
    result = figures(
        [
            Sample(0.0, 2.0, ((0.5, 1), (1.0, 1), (2.0, 2)), None),
            Sample(1.0, 4.0, ((1.5, 1),), None),
            Sample(1.0, 3.0, ((2.0, 9),), "INTERNAL"),
            Sample(1.0, 1.0, (), "RESOURCE_EXHAUSTED (QUEUE_FULL)"),
            Sample(1.0, 1.0, (), "RESOURCE_EXHAUSTED (QUEUE_FULL)"),
        ]
    )
    assert (result.completed, result.output_token_count, result.wall_seconds) == (2, 5, 4.0)
    assert result.errors == {"RESOURCE_EXHAUSTED (QUEUE_FULL)": 2, "INTERNAL": 1}
    assert result.tokens_per_second == 5 / 4
    assert result.stream_tokens_per_second == percentiles([2.0])
    assert result.time_to_first_token_seconds == percentiles([0.5, 0.5])
    # Two tokens in one message, one second after the previous: two intervals of half a second.
    assert result.inter_token_seconds == percentiles([0.5, 0.5, 0.5])


def test_nothing_complete_has_no_rates() -> None:
    result = figures([Sample(1.0, 1.0, (), "INTERNAL")])
    assert result.tokens_per_second is None
    assert result.time_to_first_token_seconds is None


def test_a_histogram_counts_every_value_once() -> None:
    values = [0.001 * number for number in range(100)] + [5.0]
    for unicode in (True, False):
        lines = histogram(values, unicode=unicode)
        assert sum(int(line.split()[-1]) for line in lines) == len(values)
        assert all(line.isascii() for line in lines) is not unicode
    assert "5000.0 ms" in histogram(values, unicode=True)[-1]
    assert len(histogram([0.25, 0.25], unicode=True)) == 1


def test_the_drafts_of_all_complete_answers_are_added_up() -> None:
    first = SpeculationUsage(8, 6, 2, 3, 0.5, 0.25, 4, 3, (0, 0, 3))
    second = SpeculationUsage(4, 1, 3, 2, 0.25, 0.5, 1, 0, (1, 1))
    nothing = SpeculationUsage(0, 0, 0, 0, 0.0, 0.0)
    samples = [Sample(0.0, 1.0, (), None, own) for own in (first, second, nothing)]
    samples.append(Sample(0.0, 1.0, (), "UNAVAILABLE", first))
    assert figures(samples).drafts == SpeculationUsage(12, 7, 5, 5, 0.75, 0.75, 5, 3, (1, 1, 3))
    assert figures([Sample(0.0, 1.0, (), None, nothing), Sample(0.0, 1.0, (), None)]).drafts is None


def test_drafts_are_shown_by_source_and_length(server: FakeDashServer, command: Command) -> None:
    speculation = generation_pb2.SpeculationUsage(
        drafted_token_count=8,
        accepted_token_count=6,
        text_drafted_token_count=4,
        text_accepted_token_count=3,
        accepted_length_counts=[0, 0, 3],
    )
    usage = generation_pb2.Usage(output_token_count=3, speculation=speculation)
    server.script = [*HELLO[:-1], finished(usage=usage)]
    out = command("bench --requests 2 --mode exact").out
    assert "16, 12 accepted; of these from the text 8, 6 accepted" in out
    assert "accepted at a time   2: 6\n" in out


def test_it_sends_so_many_requests_with_the_options(server: FakeDashServer, command: Command) -> None:
    line = "bench --requests 5 --concurrency 2 --warm-up 2 --max-new-tokens 7 --mode adaptive --raw --prompt Sea"
    out = command(line).out
    assert "fake-model at" in out
    assert "5 requests, 2 at a time" in out
    assert "complete             5 in" in out
    assert "15 tokens" in out
    for title in ("first token, ms", "between tokens, ms", "time to first token, 5 measured"):
        assert title in out
    generations = [request.parameters for request in server.requests if hasattr(request, "parameters")]
    assert len(generations) == 2 + 5
    assert all(parameters.text == "Sea" for parameters in generations)
    assert all(parameters.stopping.max_new_tokens == 7 for parameters in generations)


def test_as_many_run_at_a_time_as_asked_for(server: FakeDashServer, command: Command) -> None:
    barrier = threading.Barrier(3)
    server.script = [HELLO[0], lambda context: barrier.wait(10) and None, *HELLO[1:]]
    command("bench --requests 6 --concurrency 3 --warm-up 0 --json")


def test_a_session_carries_all_requests_on_one_stream(server: FakeDashServer, command: Command) -> None:
    assert json.loads(command("bench --requests 6 --concurrency 3 --warm-up 0 --session --json").out)["completed"] == 6
    assert server.num_sessions == 1


def test_json_has_every_figure(server: FakeDashServer, command: Command) -> None:
    out, err = command("bench --requests 4 --concurrency 2 --json")
    result = json.loads(out)
    assert err == ""
    assert (result["requests"], result["completed"], result["concurrency"]) == (4, 4, 2)
    assert result["output_token_count"] == 12
    assert result["errors"] == {}
    assert result["tokens_per_second"] > 0
    for name in ("stream_tokens_per_second", "time_to_first_token_seconds", "inter_token_seconds"):
        assert 0 < result[name]["p50"] <= result[name]["p90"] <= result[name]["p99"]


def test_errors_are_counted_by_kind_and_are_an_exit_code(server: FakeDashServer, command: Command) -> None:
    turn = itertools.count()

    def every_second_fails(context: grpc.ServicerContext) -> None:
        if next(turn) % 2:
            fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")(context)

    server.script = [every_second_fails, *HELLO]
    line = "bench --requests 6 --concurrency 1 --warm-up 0"
    assert "failed               3 with RESOURCE_EXHAUSTED" in command(line, code=1).out
    # Refusals are measured, so they are not retried.
    assert next(turn) == 6


def test_what_is_wrong_with_every_request_is_told_once(server: FakeDashServer, command: Command) -> None:
    wrong = command("bench --policy none --temperature 900", code=2)
    server.script = [fail(grpc.StatusCode.UNAUTHENTICATED, "who are you?")]
    refused = command("bench", code=4)
    assert (wrong.out, refused.out) == ("", "")
    assert "temperature" in wrong.err
    assert "who are you?" in refused.err


def test_ctrl_c_reports_what_came_so_far_and_exits_130(server: FakeDashServer) -> None:
    turn = itertools.count()
    reached = threading.Event()

    def third_hangs(context: grpc.ServicerContext) -> None:
        if next(turn) >= 2:
            reached.set()
            server.wait(context)

    server.script = [*HELLO[:2], third_hangs, *HELLO[2:]]
    with run_command("bench", "--requests", "9", "--concurrency", "1", "--warm-up", "0") as process:
        assert reached.wait(15)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "complete             2 in" in out
    assert "interrupted after 2 of 9" in err
    assert "Traceback" not in err
    assert server.cancelled.wait(30)
