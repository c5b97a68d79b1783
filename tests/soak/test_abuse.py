"""Runs short versions of what `make abuse` runs for six minutes."""

import pytest

from benchmarks.abuse.__main__ import run

ATTACKS = ["unfinished-without-token", "unfinished-with-token", "many-messages", "never-read", "cancelled-grammars"]


@pytest.mark.alone  # it measures latencies
@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_caller_beside_an_attack_does_not_feel_it(attack: str) -> None:
    findings = await run(attack, seconds=2.0)
    assert [finding for finding in findings if not finding.held] == []
