"""Runs short versions of what `make soak` runs for three quarters of an hour."""

from pathlib import Path

import pytest

from benchmarks.soak import chaos, connections, deaths, draining, fuzz, streams
from benchmarks.soak.report import Finding


def assert_held(findings: list[Finding]) -> None:
    assert findings
    assert not [finding for finding in findings if not finding.held]


@pytest.mark.alone  # it loads the machine by itself
async def test_mixed_streams_end_well_and_equal_the_same_requests_alone(tiny_folder: Path) -> None:
    assert_held(await streams.run(seconds=4, num_streams=12, num_samples=10, tiny_model=tiny_folder))


@pytest.mark.long
async def test_a_worker_killed_under_load_costs_only_what_it_had(tiny_folder: Path) -> None:
    assert_held(await deaths.run(num_kills=2, seconds_between=1.5, num_callers=6, tiny_model=tiny_folder))


@pytest.mark.long
async def test_fuzzed_requests_are_answered_or_refused_by_field(tiny_folder: Path) -> None:
    assert_held(await fuzz.run(800, tiny_model=tiny_folder))


async def test_dropped_connections_leave_nothing() -> None:
    assert_held(await connections.run(300, num_pings=0))


async def test_a_slow_reader_costs_no_memory() -> None:
    assert_held(await draining.run_slow_reader(5))


@pytest.mark.long
@pytest.mark.parametrize("fault", sorted(set(chaos.FAULTS) - {"damaged-native-code", "small-disk"}))
async def test_what_a_server_stands_on_breaks_and_callers_have_a_result_or_unavailable(
    fault: str, tiny_folder: Path
) -> None:
    if "disk" in fault and not chaos.can_mount():
        pytest.skip("needs user namespaces, to mount a disk")
    assert_held(await chaos.run(tiny_folder, [fault], pace=0.25))
