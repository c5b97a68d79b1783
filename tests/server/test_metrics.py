"""The metrics of a real server with the fake worker, as Prometheus scrapes them."""

import asyncio
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from dash_api.v1 import generation_pb2
from dash_runtime.config import GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.events import DepthStatistics, EndReason, SequenceFinished, SlotGranted, SpeculationStatistics
from dash_server.admission import Admission
from dash_server.dispatcher import Dispatcher
from dash_server.from_pb import PreparedRequest
from dash_server.pace import Pace
from dash_server.request_record import RequestRecord
from dash_server.telemetry.metrics import Metrics, Sources
from tests.server.scraping import REQUESTS, scrape
from tests.server.server_harness import fake_model, running_server


async def test_tokens_times_and_costs_of_requests_add_up(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), metrics_port=0) as server:
        for num_tokens in (3, 4, 5):
            await server.generate(text="hello", max_new_tokens=num_tokens)
        seen = await scrape(server)
    assert seen.value(f"{REQUESTS}_count", dash_mode="adaptive", gen_ai_request_model="fake") == 3
    assert seen.value(f"{REQUESTS}_count", error_type="") == 3
    assert 0 < seen.value(f"{REQUESTS}_sum") < 30
    assert seen.value("gen_ai_server_time_to_first_token_seconds_count") == 3
    # The fake worker always says that it decoded for half a second.
    assert seen.value("gen_ai_server_time_per_output_token_seconds_sum") == pytest.approx(0.5 / 2 + 0.5 / 3 + 0.5 / 4)
    assert seen.value("dash_tokens_total", dash_token_type="input") == 15
    assert seen.value("dash_tokens_total", dash_token_type="output") == 12
    assert seen.value("dash_tokens_total", dash_token_type="cached_input") == 0
    assert seen.value("dash_cost_share_sum") / seen.value("dash_cost_share_count") == 0.75
    assert seen.value("dash_exposed_policy_time_seconds_sum") == pytest.approx(0.003)


async def test_actions_are_counted_by_layer_and_action(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), metrics_port=0) as server:
        for _ in range(2):
            await server.generate(text="hello", max_new_tokens=2)
        seen = await scrape(server)
    assert seen.value("dash_actions_total", dash_layer="0", dash_action="full") == 2
    assert seen.value("dash_actions_total", dash_layer="1", dash_action="skip") == 2
    assert seen.value("dash_actions_total", dash_action="full") == 4
    assert seen.value("dash_actions_total", dash_action="int8") == 0


async def test_requests_that_failed_have_their_status_as_error_type(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01), metrics_port=0) as server:
        call = server.stream(text="abc", max_new_tokens=4000)
        await call.read()
        await call.read()
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generate(timeout=1, text="abc", max_new_tokens=4000)
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generate(max_new_tokens=4)
        async with asyncio.timeout(30):
            while server.server.admission.num_inside:
                await asyncio.sleep(0.01)
        seen = await scrape(server)
    for status in ("CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"):
        assert seen.value(f"{REQUESTS}_count", error_type=status) == 1, status
    assert seen.value(f"{REQUESTS}_count", error_type="INVALID_ARGUMENT", dash_mode="") == 1
    # Tokens of callers that left count; their times do not.
    assert seen.value("dash_tokens_total", dash_token_type="output") > 1
    assert "gen_ai_server_time_to_first_token_seconds_count" not in seen.series


async def test_gauges_follow_what_is_inside(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01), metrics_port=0, slots=2) as server:
        calls = [server.stream(text="abc", max_new_tokens=1000) for _ in range(3)]
        await server.wait_until_inside(2, 1)
        seen = await scrape(server)
        for call in calls:
            call.cancel()
        await server.wait_until_inside(0, 0)
        async with asyncio.timeout(30):
            while server.server.admission.num_inside:
                await asyncio.sleep(0.01)
        after = await scrape(server)
    names = ("dash_requests_inside", "dash_queue_requests", "dash_slots_used", "dash_slots", "dash_workers_ready")
    assert [seen.value(name) for name in names] == [3, 1, 2, 2, 1]
    assert [after.value(name) for name in names] == [0, 0, 0, 2, 1]
    assert seen.value("dash_cache_tokens") == 2 * (3 + 1000)
    assert after.value("dash_cache_tokens") == 0
    assert seen.value("dash_cache_limit") == 8192


async def test_a_worker_started_in_place_of_a_dead_one_is_counted(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, die_after=3), metrics_port=0) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generate(text="abc", max_new_tokens=20)
        await server.wait_until_serving()
        seen = await scrape(server)
    assert seen.value("dash_worker_restarts_total") == 1
    assert seen.value(f"{REQUESTS}_count", error_type="UNAVAILABLE") == 1


async def test_replaced_cost_tables_are_counted_over_a_workers_death(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, die_after=3, replaces_costs=2), metrics_port=0) as server:
        await server.generate(text="abc", max_new_tokens=1)
        before = await scrape(server)
        with pytest.raises(grpc.aio.AioRpcError):
            await server.generate(text="abc", max_new_tokens=20)
        await server.wait_until_serving()
        await server.generate(text="abc", max_new_tokens=1)
        after = await scrape(server)
    assert [seen.value("dash_cost_table_replacements_total") for seen in (before, after)] == [2, 4]
    assert before.value("dash_cost_table_error") == 0.015


async def test_nothing_that_callers_choose_makes_a_series(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), metrics_port=0) as server:
        await server.generate(text="abc", max_new_tokens=2)
        before = await scrape(server)
        for number in range(20):
            await server.generate(
                text=f"prompt {number}",
                max_new_tokens=2 + number,
                stop_strings=(f"stop {number}",),
                sampling=generation_pb2.SamplingParameters(seed=number, temperature=1 + number / 20),
            )
        after = await scrape(server)
    assert {name: after.kinds(name) for name in after.series} == {name: before.kinds(name) for name in before.series}


async def test_a_server_that_nobody_asked_for_metrics_has_none(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        await server.generate(text="abc", max_new_tokens=2)
        assert server.server.metrics is None


def test_drafts_and_guesses_are_counted_as_drafted_and_as_accepted() -> None:
    reader = InMemoryMetricReader()
    dispatcher = Dispatcher(Pace())
    sources = Sources(Admission(1), dispatcher, (), lambda: "model", dropped_spans=lambda: 7)
    metrics = Metrics(MeterProvider([reader]).get_meter("test"), sources)
    drafts = SpeculationStatistics(12, 5, 4, [0, 2, 0, 1, 1], 100_000_000, 200_000_000)
    guesses = SpeculationStatistics(9, 9, 2, [1, 2], 0, 0)
    for mode, speculation in {Mode.EXACT: drafts, Mode.FULL_DEPTH: guesses}.items():
        request = GenerationRequest("id", [1, 2], StoppingParameters(max_new_tokens=20), skip=SkipOptions(mode))
        record = RequestRecord("id", "Generate", None, prepared=PreparedRequest(request, (), frozenset()))
        record.granted = SlotGranted("id", "draft", None, 0.0)
        depth = DepthStatistics(19, [], {}, total_cost=0.6 * 19, exposed_ns=0)
        record.finished = SequenceFinished("id", EndReason.LENGTH, 20, 0, 1, depth, speculation)
        record.ended_unix_ns = record.started_unix_ns + 10**9
        metrics.observe(record)
    points = {
        (metric.name, *point.attributes.values()): getattr(point, "value", None) or point.sum
        for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        if metric.name in ("dash.drafts", "dash.draft.accepted_length", "dash.spans.dropped")
        for point in metric.data.data_points
    }
    assert points == {
        ("dash.drafts", "model", "drafted"): 7,
        ("dash.drafts", "model", "accepted"): 5,
        ("dash.drafts", "text", "drafted"): 5,
        ("dash.drafts", "text", "accepted"): 4,
        ("dash.drafts", "guess", "drafted"): 9,
        ("dash.drafts", "guess", "accepted"): 2,
        ("dash.draft.accepted_length",): 9,
        ("dash.spans.dropped",): 7,
    }
