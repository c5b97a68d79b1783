"""The turns of sequences in mode EXACT: when they draft, and which drafts are verified together.

Knows sequences; knows no decoder.
"""

import math
from itertools import accumulate

from dash_runtime.engine.sequence import Sequence
from dash_runtime.engine.speculative import WantedDraft
from dash_runtime.policy.draft_costs import RoundCosts
from dash_runtime.policy.draft_length import DraftCosts

_LEAST_GAIN = 1.2
"""Expected gain below which drafts of some sequences are not verified: those without one wait for that. It also pays
for what the costs leave out, which grows with the number of sequences."""
_LONGEST_REST = 4
"""Most tokens that several sequences decode before they ask again what would pay."""


class DraftRounds:
    """Has sequences draft in step and verifies all drafts in one pass, so that a pass reads weights once for all.

    A round has some passes that draft, as many as its sequences want on average, and then one verification. A sequence
    whose draft is complete waits for the others. If no pass drafts, only those sequences have drafts, from the text,
    with which the verification gains most. A lone sequence drafts as far as pays for itself.

    Args:
        costs: None: a draft costs what its sequence takes it to, neighbours or not.
        is_shared: False if sequences share no passes: each drafts as if it were alone, and waits for none.
    """

    def __init__(self, costs: RoundCosts | None, is_shared: bool) -> None:
        self._costs = costs
        self._is_shared = is_shared
        self._passes_left: int | None = None
        self._num_fruitless = self._rest = 0
        """Rounds in a row in which nothing paid, and tokens to decode before the next one."""

    def begin(self, sequences: list[Sequence]) -> list[Sequence]:
        """Begins the drafts that are due. Returns those of the sequences that decode or draft a token next."""
        drafters = _drafters(sequences)
        if not drafters:
            return sequences
        num_others = len(sequences) - len(drafters)
        together = (len(drafters), num_others) if self._is_shared else (1, 0)
        costs = None if self._costs is None else self._costs.of(*together)
        due = [sequence for sequence in drafters if not sequence.has_draft]
        if len(due) == len(drafters):
            due = self._begin_round(due, num_others, costs)
        for sequence in due:
            sequence.begin_draft(costs, self._passes_left)
        if self._passes_left:
            self._passes_left -= 1
        waits = self._is_shared and any(sequence.has_draft for sequence in drafters)
        return [own for own in sequences if own.speculation is None or own.is_drafting or not (waits or own.has_draft)]

    def complete(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """Returns the groups of the sequences that are verified now, each in one pass; some may have no draft."""
        drafters = _drafters(sequences)
        drafted = [sequence for sequence in drafters if sequence.has_draft and not sequence.is_drafting]
        if not self._is_shared:
            return [[sequence] for sequence in drafted]
        if not drafted or any(sequence.is_drafting for sequence in drafters):
            return []
        groups, room = list[list[Sequence]](), 0.0
        for sequence in drafters:
            if sequence.num_rows_to_verify > room:
                groups.append([])
                room = math.inf if self._costs is None else self._costs.most_rows
            groups[-1].append(sequence)
            room -= sequence.num_rows_to_verify
        return groups

    def _begin_round(self, sequences: list[Sequence], num_others: int, costs: DraftCosts | None) -> list[Sequence]:
        """Chooses the number of passes that draft. Returns the sequences that have drafts."""
        self._passes_left = None
        if self._costs is None or not self._is_shared or len(sequences) == 1:
            return sequences
        if self._rest:
            self._rest -= 1
            return []
        wanted = [sequence.wanted_draft(costs) for sequence in sequences]
        self._passes_left = round(sum(draft.num_by_model for draft in wanted) / len(wanted))
        if self._passes_left:
            return sequences
        places = _free_drafts_that_pay(wanted, self._costs, num_others)
        self._num_fruitless = 0 if places else min(_LONGEST_REST, self._num_fruitless + 1)
        self._rest = self._num_fruitless
        return [sequences[place] for place in places]


def _drafters(sequences: list[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.speculation is not None]


def _free_drafts_that_pay(wanted: list[WantedDraft], costs: RoundCosts, num_others: int) -> list[int]:
    """Returns the places of the drafts without the model that make the most of one verification; none if none pays."""
    free = [place for place, draft in enumerate(wanted) if draft.num_free]
    free.sort(key=lambda place: (1 - wanted[place].expected) / wanted[place].num_free)  # most output for its rows first
    outputs = accumulate((wanted[place].expected - 1 for place in free), initial=float(len(wanted)))
    rows = accumulate((wanted[place].num_free for place in free), initial=len(wanted))
    best, best_gain = 0, _LEAST_GAIN
    for count, (output, num_rows) in enumerate(zip(outputs, rows, strict=True)):
        if count > 0 and num_rows <= costs.most_rows:
            gain = output / len(wanted) / costs.verification(len(wanted), num_others, num_rows)
            if gain > best_gain:
                best, best_gain = count, gain
    return free[:best]
