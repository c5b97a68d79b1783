"""Drafts from the text itself: what followed the last tokens at an earlier place (prompt lookup, Saxena 2023).

It costs no pass through the model. Searching needs no index: a few comparisons of the whole text find the longest
match. Knows one sequence's tokens; knows no model, no costs and no counts.
"""

from collections import Counter
from collections.abc import Sequence

import numpy

from dash_runtime.engine.speculative import Proposal

_LONGEST_MATCH = 16
"""Tokens of a match that are compared. Longer ones say no more, and a text that repeats itself has long ones."""


class TextDrafts:
    """The tokens of one sequence, prompt first; a `DraftSource`.

    Args:
        num_more: tokens that may follow the prompt, drafts included.
    """

    def __init__(self, prompt: Sequence[int], num_more: int) -> None:
        self._length = len(prompt)
        self._tokens = numpy.zeros(len(prompt) + num_more, numpy.int32)
        self._tokens[: self._length] = prompt
        self._after_output: tuple[int, int] | None = None
        """What `_find` returned for the text as it is, without a draft."""

    def append(self, token_id: int) -> None:
        self._tokens[self._length] = token_id
        self._length += 1
        self._after_output = None

    def propose(self, drafted: Sequence[int], count: int) -> Proposal:
        if not drafted and self._after_output is not None:
            place, match = self._after_output
        else:
            place, match = self._find(drafted)
            self._after_output = self._after_output if drafted else (place, match)
        if not match:
            return Proposal([], 0)
        end = self._length + len(drafted)
        token_ids = self._tokens[place : min(end, place + count)].tolist()
        while len(token_ids) < count:  # a match that reaches the end goes on as it did so far
            token_ids.append(token_ids[place - end])
        return Proposal(token_ids, match)

    def _find(self, drafted: Sequence[int]) -> tuple[int, int]:
        """Returns where the text goes on, and how many tokens before agree; none if it never had the last one."""
        end = self._length + len(drafted)
        self._tokens[self._length : end] = drafted
        text = self._tokens[:end]
        places, match = _places_after_longest_match(text)
        if not match:
            return end, 0
        followers = text[places].tolist()
        counts = Counter(reversed(followers))  # of equally frequent ones, the latest comes first
        best = max(counts, key=counts.__getitem__)
        return int(places[len(followers) - 1 - followers[::-1].index(best)]), match


def _places_after_longest_match(text: numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """Returns where the text went on after its last tokens, ascending, and how many of these agree at every place."""
    places = numpy.flatnonzero(text[:-1] == text[-1:]) + 1
    match = int(len(places) > 0)
    while match and match < _LONGEST_MATCH:
        longer = places[places > match]
        longer = longer[text[longer - 1 - match] == text[-1 - match]]
        if not len(longer):
            break
        places, match = longer, match + 1
    return places, match
