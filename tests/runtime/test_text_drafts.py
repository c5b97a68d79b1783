"""Drafts from the text follow its longest and most frequent matches, at a bounded cost."""

import random
import time
from collections.abc import Sequence

import pytest

from dash_runtime.engine.speculative import Proposal
from dash_runtime.engine.text_drafts import TextDrafts


def propose(text: Sequence[int], count: int = 3, drafted: Sequence[int] = ()) -> Proposal:
    return TextDrafts(text, 32).propose(drafted, count)


def test_what_followed_the_longest_match_is_proposed() -> None:
    assert propose([5, 1, 2, 8, 8, 9, 1, 2, 6, 6, 5, 1, 2]) == Proposal([8, 8, 9], 3)


def test_of_equally_long_matches_the_most_frequent_follower_is_proposed_and_else_the_latest() -> None:
    assert propose([1, 7, 1, 7, 1, 8, 1], 1) == Proposal([7], 1)
    assert propose([1, 7, 2, 1, 8, 2, 1], 1) == Proposal([8], 2)
    assert propose([1, 7, 1, 8, 1], 1) == Proposal([8], 1)


def test_nothing_is_proposed_after_a_token_that_the_text_does_not_have() -> None:
    assert propose([1, 2, 3]) == Proposal([], 0)
    assert propose([4]) == propose([]) == Proposal([], 0)


def test_a_match_that_reaches_the_end_goes_on_in_its_period() -> None:
    assert propose([4, 1, 2, 3, 1, 2, 3], 7).token_ids == [1, 2, 3, 1, 2, 3, 1]
    assert propose([9, 9], 4) == Proposal([9, 9, 9, 9], 1)


def test_drafted_tokens_count_as_text_until_others_take_their_place() -> None:
    drafts = TextDrafts([1, 2, 3, 1], 8)
    assert drafts.propose([2], 2) == Proposal([3, 1], 2)
    assert drafts.propose([], 2) == drafts.propose((), 2) == Proposal([2, 3], 1)
    assert drafts.propose([2], 2) == Proposal([3, 1], 2)
    drafts.append(4)
    assert drafts.propose([], 2) == Proposal([], 0)
    drafts.append(1)
    assert drafts.propose((), 2) == Proposal([4, 1], 1)


def by_hand(text: Sequence[int]) -> tuple[int, int]:
    """Returns the token after the longest match, the most frequent and latest one, and the match's length."""
    matches = {
        place: next(own for own in range(17) if own == min(16, place) or text[place - 1 - own] != text[-1 - own])
        for place in range(1, len(text))
    }
    longest = max(matches.values(), default=0)
    followers = [text[place] for place, own in matches.items() if own == longest]
    return max(reversed(followers), key=followers.count, default=0), longest


@pytest.mark.parametrize("num_tokens", [2, 5, 40])
def test_many_and_few_places_are_searched_alike(num_tokens: int) -> None:
    source = random.Random(num_tokens)
    for length in (1, 2, 17, 60, 200):
        text = [source.randrange(num_tokens) for _ in range(length)]
        text += text[length // 2 :][:20]  # else long matches are rare
        for num_drafted in (0, 1, 5):
            first = max(0, len(text) - num_drafted)
            proposal = propose(text[:first], 1, text[first:])
            follower, longest = by_hand(text)
            assert proposal == (Proposal([follower], longest) if longest else Proposal([], 0))


@pytest.mark.parametrize("text", [[7] * 8192, list(range(8192))], ids=["one token repeated", "all different"])
def test_texts_made_to_defeat_a_search_take_less_than_a_millisecond(text: list[int]) -> None:
    drafts = TextDrafts(text, 32)
    seconds = []
    for _ in range(20):
        started = time.process_time()
        drafts.propose((), 15)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.001
