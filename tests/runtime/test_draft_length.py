"""Draft lengths follow counts and costs, and nothing is drafted if it does not pay."""

import pytest

from dash_runtime.policy.draft_length import DraftLength, drafting_gain

CHEAP = {1: 1.2, 3: 1.25, 7: 1.4}


def test_the_gain_is_what_drafting_by_hand_comes_to() -> None:
    # One drafted token, accepted half the time: 1.5 tokens in the time of half a token and one verification.
    assert drafting_gain(0.5, 0.5, 1, 1.0) == pytest.approx(1.5 / 1.5)
    assert drafting_gain(1.0, 0.25, 4, 1.0) == pytest.approx(5 / 2)
    assert drafting_gain(0.0, 0.25, 4, 1.0) == pytest.approx(1 / 2)


def test_drafts_grow_while_all_is_accepted_and_stop_when_nothing_is() -> None:
    lengths = DraftLength(0.45, CHEAP)
    first = lengths.next(100)
    assert first in CHEAP
    for _ in range(10):
        lengths.verified(first, was_rejected=False)
    assert lengths.next(100) == 7
    for _ in range(40):
        lengths.verified(0, was_rejected=True)
    assert lengths.next(100) == 0


def test_two_failed_drafts_at_the_start_are_enough_to_go_on_without() -> None:
    lengths = DraftLength(0.45, CHEAP)
    num_failed = 0
    while lengths.next(100):
        lengths.verified(0, was_rejected=True)
        num_failed += 1
    assert num_failed <= 3


def test_a_hopeless_sequence_loses_at_most_a_twentieth_of_its_time() -> None:
    lengths, seconds, num_tokens = DraftLength(0.45, CHEAP), 0.0, 0
    while num_tokens < 128:
        length = lengths.next(128 - num_tokens)
        seconds += length * 0.45 + CHEAP[length] if length else 1.0
        lengths.verified(0, was_rejected=length > 0)
        num_tokens += 1
    assert seconds <= 128 * 1.05


def test_a_sequence_that_was_hard_is_tried_again() -> None:
    lengths = DraftLength(0.45, CHEAP)
    while lengths.next(1000):
        lengths.verified(0, was_rejected=True)
    for _ in range(200):
        lengths.verified(0, was_rejected=False)
    assert lengths.next(1000) > 0


def test_a_draft_leaves_room_for_the_token_that_full_depth_adds() -> None:
    lengths = DraftLength(0.1, CHEAP)
    assert [lengths.next(left) for left in (1, 2, 3, 4, 7, 8)] == [0, 1, 1, 3, 3, 7]


def test_nothing_is_drafted_where_a_draft_costs_what_full_depth_does() -> None:
    assert DraftLength(1.0, CHEAP).next(100) == 0
    lengths = DraftLength(0.3, CHEAP)
    for _ in range(50):  # it turned out dearer than expected
        lengths.drafted(1.0)
    assert lengths.next(100) == 0


def test_nothing_is_drafted_where_no_length_is_allowed() -> None:
    assert DraftLength(0.1, {}).next(100) == 0
