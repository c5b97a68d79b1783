"""Drafts of several sequences cost what their passes take together, less what others put out meanwhile."""

import pytest

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.policy.draft_costs import RoundCosts
from dash_runtime.policy.draft_length import MOST_BY_MODEL

VERIFICATION = {1: 1.1, 3: 1.2, 7: 1.4, 15: 1.8}


def passes(first: float = 4.0, later: float = 2.0) -> tuple[LatencyTable, ...]:
    """Full depth takes ten seconds and one more for each further row; a drafting pass `first`, then `later`."""
    full = (10.0, 11.0, 13.0)
    return tuple(
        LatencyTable((1, 2, 4), {Action.INT4: (own, own + 0.5, own + 1.5), Action.FULL: full}) for own in (first, later)
    )


COSTS = RoundCosts(passes(), 0.2, VERIFICATION, 64)


def test_a_lone_sequence_pays_what_was_measured() -> None:
    costs = COSTS.of(1, 0)
    assert costs.offset == 0
    assert len(costs.drafts) == MOST_BY_MODEL + 1
    # The first drafting pass takes 0.4 of full depth's, twice what the cost table says; later ones take 0.2.
    assert list(costs.drafts[:4]) == pytest.approx([0, 2, 3, 4])
    assert [costs.verification[length] for length in VERIFICATION] == pytest.approx(list(VERIFICATION.values()))


def test_two_sequences_pay_a_half_each_of_passes_that_take_longer() -> None:
    costs = COSTS.of(2, 0)
    assert costs.drafts[1] * 0.2 == pytest.approx(4.5 / 11)
    assert costs.drafts[3] * 0.2 == pytest.approx((4.5 + 2.5 + 2.5) / 11)
    # Four rows: eleven seconds for two, and for two more what a lone draft's rows add.
    assert costs.verification[1] == pytest.approx((11 + 10 * (1.2 - 1.1)) / 11)


def test_drafts_of_more_sequences_cost_more_of_a_full_depth_pass_and_have_no_more_rows_than_were_measured() -> None:
    made = [COSTS.of(count, 0) for count in (1, 2, 4, 8)]
    assert [own.drafts[1] for own in made] == sorted(own.drafts[1] for own in made)
    assert 1.0 < made[1].verification[1] < made[2].verification[1] < made[3].verification[1]
    assert [len(own.verification) for own in made] == [15, 7, 3, 1]
    assert not COSTS.of(9, 0).verification
    assert not COSTS.of(100, 0).verification


def test_only_a_lone_sequence_has_more_rows_than_may_be_shared() -> None:
    costs = RoundCosts(passes(), 0.2, VERIFICATION, 8)
    assert costs.most_rows == 8
    assert [len(costs.of(count, 0).verification) for count in (1, 2, 4)] == [15, 3, 1]


def test_sequences_that_decode_meanwhile_make_drafts_dearer_by_what_they_lose() -> None:
    alone, beside = COSTS.of(1, 0), COSTS.of(1, 1)
    # Together they would put out 2 tokens in 11 seconds. A drafting pass takes 10 for the other's token, and 4 more.
    assert beside.offset + beside.drafts[1] * 0.2 == pytest.approx(2 / 11 * 14 - 1)
    assert beside.verification[1] == pytest.approx(2 / 11 * (10 + 11) - 1)
    assert beside.verification[1] > alone.verification[1]


def test_a_device_whose_only_kernel_is_full_depth_drafts_at_its_price() -> None:
    full_only = (LatencyTable((1,), {Action.FULL: (10.0,)}),)
    assert RoundCosts(full_only, 1.0, VERIFICATION, 64).of(1, 0).drafts[2] == pytest.approx(2)


def test_a_model_whose_context_holds_no_draft_has_no_lengths() -> None:
    assert not RoundCosts(passes(), 0.2, {}, 64).of(1, 0).verification
