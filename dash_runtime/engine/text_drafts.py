"""Drafts from the text itself: what followed the last tokens at an earlier place (prompt lookup, Saxena 2023).

It costs no pass through the model. Places are known by their last token; where these are many, a few comparisons of the
whole text find the longest match. Knows one sequence's tokens; knows no model, no costs and no counts.
"""

from collections import Counter
from collections.abc import Sequence

import numpy

from dash_runtime.engine.speculative import Proposal
from dash_runtime.passes import LONGEST_MATCH

_FEW_PLACES = 16
"""Places that are compared one by one; more are compared all at once, which takes a few microseconds however few."""


class TextDrafts:
    """The tokens of one sequence, prompt first; a `DraftSource`.

    Args:
        num_more: tokens that may follow the prompt, drafts included.
    """

    def __init__(self, prompt: Sequence[int], num_more: int) -> None:
        self._tokens: list[int] = []
        self._array = numpy.zeros(len(prompt) + num_more, numpy.int32)
        """The same tokens, and those of drafts."""
        self._places: dict[int, list[int]] = {}
        """The places after each token, ascending."""
        self._after_output: tuple[int, int] | None = None
        """The place and the match that `_find` returned for the text without a draft."""
        for token_id in prompt:
            self.append(token_id)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> numpy.ndarray:
        """The text so far, int32; not to be written to."""
        return self._array[: len(self._tokens)]

    def append(self, token_id: int) -> None:
        place = len(self._tokens)
        if place:
            self._places.setdefault(self._tokens[-1], []).append(place)
        self._tokens.append(token_id)
        self._array[place] = token_id
        self._after_output = None

    def propose(self, drafted: Sequence[int], count: int) -> Proposal:
        if not drafted and self._after_output is not None:
            place, match = self._after_output
        else:
            place, match = self._find(drafted)
            self._after_output = self._after_output if drafted else (place, match)
        if not match:
            return Proposal([], 0)
        end = len(self._tokens) + len(drafted)
        token_ids = self._array[place : min(end, place + count)].tolist()
        while len(token_ids) < count:  # a match that reaches the end goes on as it did so far
            token_ids.append(token_ids[place - end])
        return Proposal(token_ids, match)

    def _find(self, drafted: Sequence[int]) -> tuple[int, int]:
        """Returns where the text goes on, and how many tokens before agree; none if it never had the last one."""
        text = [*self._tokens, *drafted] if drafted else self._tokens
        if not text:
            return 0, 0
        first = len(self._tokens)
        places = self._places.get(text[-1], [])
        if drafted:
            self._array[first : len(text)] = drafted
            places = [*places, *(place for place in range(max(first, 1), len(text)) if text[place - 1] == text[-1])]
        if len(places) > _FEW_PLACES:
            array, match = _places_after_longest_match(self._array[: len(text)])
            places = array.tolist()
        else:
            places, match = _longest_of_few(text, places)
        if not match:
            return len(text), 0
        followers = [text[place] for place in places]
        counts = Counter(reversed(followers))  # of equally frequent ones, the latest comes first
        best = max(counts, key=counts.__getitem__)
        return places[len(followers) - 1 - followers[::-1].index(best)], match


def _longest_of_few(text: Sequence[int], places: Sequence[int]) -> tuple[list[int], int]:
    """Returns what `_places_after_longest_match` does, given all places after the last token."""
    longest, match = list[int](), 0
    for place in places:
        own = 1
        while own < min(LONGEST_MATCH, place) and text[place - 1 - own] == text[-1 - own]:
            own += 1
        if own > match:
            longest, match = [], own
        if own == match:
            longest.append(place)
    return longest, match


def _places_after_longest_match(text: numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """Returns where the text went on after its last tokens, ascending, and how many of these agree at every place."""
    places = numpy.flatnonzero(text[:-1] == text[-1:]) + 1
    match = int(len(places) > 0)
    while match and match < LONGEST_MATCH:
        longer = places[places > match]
        longer = longer[text[longer - 1 - match] == text[-1 - match]]
        if not len(longer):
            break
        places, match = longer, match + 1
    return places, match
