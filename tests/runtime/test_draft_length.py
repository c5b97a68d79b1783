"""Drafts follow counts and costs, whoever drafts, and nothing is drafted if it does not pay."""

import pytest

from dash_runtime.policy.draft_length import (
    MOST_BY_MODEL,
    DraftCosts,
    DraftLength,
    NextDraft,
    drafting_gain,
    every_length,
)

CHEAP = {1: 1.2, 3: 1.25, 7: 1.4}


def test_the_gain_is_what_drafting_by_hand_comes_to() -> None:
    # One drafted token, accepted half the time: 1.5 tokens in the time of half a token and one verification.
    assert drafting_gain(0.5, 0.5, 1, 1.0) == pytest.approx(1.5 / 1.5)
    assert drafting_gain(1.0, 0.25, 4, 1.0) == pytest.approx(5 / 2)
    assert drafting_gain(0.0, 0.25, 4, 1.0) == pytest.approx(1 / 2)


def test_drafts_grow_while_all_is_accepted_and_stop_when_nothing_is() -> None:
    lengths = DraftLength(0.45, CHEAP)
    first = lengths.next(100).length
    assert 1 <= first <= 7
    for _ in range(10):
        lengths.verified([0] * first, first)
    assert lengths.next(100).length == 7
    for _ in range(40):
        lengths.verified([0], 0)
    assert lengths.next(100).length == 0


def test_two_failed_drafts_at_the_start_are_enough_to_go_on_without() -> None:
    lengths = DraftLength(0.45, CHEAP)
    num_failed = 0
    while lengths.next(100).length:
        lengths.verified([0], 0)
        num_failed += 1
    assert num_failed <= 3


def test_a_hopeless_sequence_loses_at_most_a_twentieth_of_its_time() -> None:
    lengths, seconds, num_tokens = DraftLength(0.45, CHEAP), 0.0, 0
    while num_tokens < 128:
        length = lengths.next(128 - num_tokens).length
        seconds += length * 0.45 + every_length(CHEAP)[length] if length else 1.0
        lengths.verified([0] * length, 0)
        num_tokens += 1
    assert seconds <= 128 * 1.05


def test_a_sequence_that_was_hard_is_tried_again() -> None:
    lengths = DraftLength(0.45, CHEAP)
    while lengths.next(1000).length:
        lengths.verified([0], 0)
    for _ in range(200):
        lengths.verified([], 0)
    assert lengths.next(1000).length > 0


def test_a_draft_leaves_room_for_the_token_that_full_depth_adds() -> None:
    lengths = DraftLength(0.1, CHEAP)
    assert [lengths.next(left).length for left in (1, 2, 3, 4, 7, 8)] == [0, 1, 2, 3, 6, 7]


def test_nothing_is_drafted_where_a_draft_costs_what_full_depth_does() -> None:
    assert DraftLength(1.0, CHEAP).next(100).length == 0
    lengths = DraftLength(0.3, CHEAP)
    for _ in range(50):  # it turned out dearer than expected
        lengths.drafted(1.0)
    assert lengths.next(100).length == 0


def test_nothing_is_drafted_where_no_length_is_allowed() -> None:
    assert DraftLength(0.1, {}).next(100, match=12).length == 0


def test_the_text_drafts_what_the_model_would_pay_for_once_its_match_is_long() -> None:
    lengths = DraftLength(0.45, CHEAP)
    assert not lengths.next(100, match=1).is_from_text
    assert lengths.next(100, match=12) == NextDraft(7, True)
    assert not lengths.next(100, match=0).is_from_text
    assert lengths.next(4, match=12) == NextDraft(3, True)


def test_a_text_that_misleads_is_not_asked_again_and_one_that_repeats_itself_is_trusted() -> None:
    misled, repeating = DraftLength(0.45, CHEAP), DraftLength(0.45, CHEAP)
    for _ in range(10):
        misled.followed(12, is_right=False)
        for match in range(1, 13):
            repeating.followed(match, is_right=True)
    assert not misled.next(100, match=12).is_from_text
    assert repeating.next(100, match=12) == NextDraft(7, True)
    assert repeating.acceptance(1) > 2 * misled.acceptance(1)
    assert misled.acceptance(1) == DraftLength(0.45, CHEAP).acceptance(1)  # other matches have counts of their own


def test_the_models_first_rejected_token_is_counted_and_none_after_it() -> None:
    lengths, once = DraftLength(0.45, CHEAP), DraftLength(0.45, CHEAP)
    lengths.verified([0, 0, 12, 0], 1)
    once.verified([0, 0], 1)
    assert [lengths.acceptance(match) for match in (0, 12)] == [once.acceptance(match) for match in (0, 12)]
    assert lengths.acceptance() < DraftLength(0.45, CHEAP).acceptance()


def test_a_draft_goes_on_by_whoever_promises_more_output_for_its_cost() -> None:
    lengths = DraftLength(0.2, CHEAP)
    assert lengths.next(100, [0, 0, 0], match=12) == NextDraft(7, True)
    assert lengths.next(100, [0, 0, 0], match=1) == NextDraft(6, False)
    assert lengths.next(100, [0] * 7, match=12) == NextDraft(7, False)
    assert lengths.next(5, [0, 0, 0], match=12) == NextDraft(4, True)
    assert lengths.next(4, [0, 0, 0], match=12) == NextDraft(3, False)  # no room


def test_a_draft_whose_first_tokens_are_doubtful_is_verified_before_more_is_paid_for() -> None:
    lengths = DraftLength(0.45, CHEAP)
    for _ in range(40):
        lengths.followed(3, is_right=False)
    assert lengths.next(100, [3, 4, 5]) == NextDraft(3, False)


def test_the_model_runs_a_guess_of_the_text_where_that_saves_more_than_its_row_costs() -> None:
    assert [DraftLength(0.45, CHEAP, second_row=0.3).guess_pays(match) for match in (0, 1, 2)] == [False, False, True]
    assert DraftLength(0.45, CHEAP, second_row=0.1).guess_pays(1)
    misled = DraftLength(0.45, CHEAP, second_row=0.1)
    for _ in range(20):
        misled.followed(1, is_right=False)
    assert not misled.guess_pays(1)


def test_costs_between_measured_lengths_are_interpolated() -> None:
    costs = every_length({4: 2.0, 1: 1.0, 5: 3.0})
    assert list(costs) == [1, 2, 3, 4, 5]
    assert list(costs.values()) == pytest.approx([1.0, 4 / 3, 5 / 3, 2.0, 3.0])
    assert every_length({3: 1.5}) == {1: 1.5, 2: 1.5, 3: 1.5}
    assert every_length({}) == {}


def test_an_output_of_any_length_is_counted() -> None:
    lengths = DraftLength(0.45, CHEAP)
    for _ in range(100_000):
        lengths.verified([0] * 7, 7)
    assert lengths.acceptance() > 0.99
    for _ in range(200):
        lengths.verified([0], 0)
    assert lengths.acceptance() < 0.3


def test_a_draft_has_the_length_that_pays_whatever_was_measured() -> None:
    steep = {1: 1.0, 4: 1.1, 5: 2.0, 31: 2.5}
    assert DraftLength(0.2, steep).next(100).length == 4  # the fifth token would cost as much as a whole one
    trusted = DraftLength(0.01, steep)
    trusted.verified([0] * 1000, 1000)
    assert trusted.next(100).length == MOST_BY_MODEL


def test_only_the_text_drafts_more_than_the_model_may() -> None:
    lengths = DraftLength(0.45, {1: 1.1, 7: 1.4, 8: 1.8, 31: 2.2})
    for _ in range(300):
        lengths.followed(12, is_right=True)
    assert lengths.next(100, match=12) == NextDraft(31, True)


def test_a_sequence_drafts_along_in_passes_that_run_anyway() -> None:
    lengths = DraftLength(0.45, CHEAP)
    for _ in range(6):
        lengths.verified([0, 0], 0)
    assert lengths.next(100).length == 0
    assert lengths.next(100, passes=2) == NextDraft(2, False)
    assert lengths.next(100, [0], passes=1) == NextDraft(2, False)
    assert lengths.next(2, passes=2) == NextDraft(1, False)
    # Nor does it draft more by the model than that, however much that would pay.
    assert DraftLength(0.1, CHEAP).next(100, passes=2).length == 2
    assert DraftLength(0.1, CHEAP).next(100, passes=0).length == 0


def test_a_long_match_is_worth_more_than_passes_that_run_anyway() -> None:
    assert DraftLength(0.45, CHEAP).next(100, match=12, passes=2) == NextDraft(7, True)
    assert DraftLength(0.45, CHEAP).next(100, match=1, passes=2) == NextDraft(2, False)


def test_a_first_drafted_token_that_costs_more_than_later_ones_makes_drafts_longer_or_none() -> None:
    lengths = DraftLength(0.3, CHEAP)
    usual = lengths.next(100).length
    lengths.pay(DraftCosts(0.0, [0.0, *(2.0 + 0.5 * more for more in range(MOST_BY_MODEL))], every_length(CHEAP)))
    assert lengths.next(100).length > usual > 1
    lengths.pay(DraftCosts(0.0, [0.0, *(20.0 + 0.5 * more for more in range(MOST_BY_MODEL))], every_length(CHEAP)))
    assert lengths.next(100).length == 0
    lengths.pay(DraftCosts(1.0, range(MOST_BY_MODEL + 1), every_length(CHEAP)))  # each pass costs a token of the others
    assert lengths.next(100).length == 0
    lengths.pay(None)
    assert lengths.next(100).length == usual


def test_neighbours_leave_room_for_fewer_tokens() -> None:
    lengths = DraftLength(0.1, CHEAP)
    assert lengths.longest == 7
    lengths.pay(DraftCosts(0.0, range(MOST_BY_MODEL + 1), {1: 1.1, 2: 1.1}))
    assert lengths.longest == lengths.next(100).length == 2
    lengths.pay(DraftCosts(0.0, range(MOST_BY_MODEL + 1), {}))
    assert lengths.next(100, match=12).length == 0


def test_what_was_counted_is_forgotten_however_long_the_output() -> None:
    lengths = DraftLength(0.3, {7: 1.4})
    before = lengths.acceptance()
    lengths.verified([0] * 7, 0)
    assert lengths.acceptance() < before
    lengths.put_out(1_000_000)
    assert lengths.acceptance() == pytest.approx(before)
