"""Runs short versions of what `make abuse` runs for six minutes."""

import pytest

from benchmarks.abuse.__main__ import run

_SLACK = 5.0
"""For machines that are busy or slow; `make abuse` has none."""
ATTACKS = ["unfinished-with-token", "many-messages", "never-read"]


@pytest.mark.alone
async def test_handshakes_that_are_given_up_do_not_end_a_server() -> None:
    findings = await run("half-open-tls", seconds=12.0, slack=_SLACK)  # gRPC gives them up after ten
    assert [finding for finding in findings if not finding.held] == []


@pytest.mark.alone  # it measures latencies
@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_caller_beside_an_attack_does_not_feel_it(attack: str) -> None:
    findings = await run(attack, seconds=2.0, slack=_SLACK)
    assert [finding for finding in findings if not finding.held] == []
