"""Chooses who drafts before the next verification and how far, from what was accepted so far.

It uses counts and fixed costs, never the clock, so that a run repeats. Knows counts and costs; knows no tokens, no
tensors and no policies. Imports no torch.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise, repeat
from operator import mul
from typing import NamedTuple

MEASURED_LENGTHS = (1, 3, 4, 7, 8, 15, 16, 31, 63)
"""Draft lengths whose verification is measured; those in between are interpolated. Kernels take rows in groups, so the
cost makes a step after 4, 8 and 16 rows: a draft and the token before it."""
MOST_BY_TEXT = 31
"""Tokens that the text drafts at a time at most. Drafts of several sequences have more rows together."""
MOST_BY_MODEL = 15
"""Tokens that the model drafts at a time at most."""
USUAL_LENGTHS = (3, 7)
USUAL_VERIFICATION_COST = 1.4
"""Cost of verifying a draft of usual length, over a full-depth token. Calibration assumes it: it knows no device."""
LEAST_GAIN = 1.05
"""Expected gain below which nothing is drafted: so small a gain would not pay for what the costs leave out."""
_MODEL_PRIOR = (8.0, 9.0)
"""A new sequence starts as if eight of nine tokens that the model drafted had been accepted. Two failed drafts then
stop that."""
MATCHES = (1, 2, 3, 4, 5, 7, 10)
"""The least lengths of the matches that are counted together."""
_TEXT_PRIORS = (0.2, 0.4, 0.45, 0.55, 0.65, 0.75, 0.88)
"""The share of tokens after such a match that came again, in 800 texts of the embedded model."""
_TEXT_TRIALS = 5.0
"""Trials that these stand for in a new sequence."""
FORCED_MATCH = 1 << 20
"""The match of a token that a constraint forces."""
_FORCED_PRIOR = (7.76, 8.0)
"""A new sequence starts as if so many of eight such tokens had been accepted: the model may still split the forced text
into others."""
_KEPT_PER_TOKEN = 0.992
"""Share of the counts that each token of output leaves, so that a sequence that was hard is tried again later."""
_LARGEST_WEIGHT = 1e30
"""Weight of a token beyond which counts are divided by it, before they leave what a float holds."""
USUAL_SECOND_ROW = 0.15
"""The cost that a second row adds to a drafting pass, as a share of the first, where that was not measured."""
_PATIENCE = 8
"""Lengths in a row that gain less than a shorter one, after which no longer one is tried: more than from one step of
the costs to where it pays."""


def drafting_gain(acceptance: float, draft_cost: float, length: int, verification_cost: float) -> float:
    """Returns the speed of drafting `length` tokens at a time, over full depth's (Leviathan et al. 2023, theorem 3.8).

    Args:
        acceptance: the probability that a drafted token is accepted if those before it were.
        draft_cost: cost of one drafted token, as a share of a full-depth token.
        verification_cost: cost of the pass that verifies them, likewise.
    """
    return expected_output([acceptance] * length)[0] / (length * draft_cost + verification_cost)


def expected_output(acceptances: Iterable[float]) -> tuple[float, float]:
    """Returns the expected output of verifying a draft, and the probability that all of the draft is accepted.

    Args:
        acceptances: each drafted token's probability to be accepted if those before it were.
    """
    chances = list(accumulate(acceptances, mul, initial=1.0))
    return sum(chances), chances[-1]


def every_length(costs: Mapping[int, float]) -> dict[int, float]:
    """Returns the cost of verifying a draft for each length from 1 to the longest in `costs`, ascending; those that
    lack are interpolated."""
    known = sorted(costs.items())
    filled = dict.fromkeys(range(1, known[0][0] + 1), known[0][1]) if known else {}
    for (low, low_cost), (high, high_cost) in pairwise(known):
        for length in range(low + 1, high + 1):
            filled[length] = low_cost + (high_cost - low_cost) * (length - low) / (high - low)
    return filled


class DraftCosts(NamedTuple):
    """The costs of one sequence's drafts, as shares of its part of a full-depth pass."""

    offset: float
    """The cost of a pass that drafts, beside the drafted token."""
    drafts: Sequence[float]
    """The cost of so many drafted tokens, from 0 to `MOST_BY_MODEL`, over what one costs by the device's table."""
    verification: Mapping[int, float]
    """The cost of the verifying pass, for each length that a draft may have, ascending from 1."""


class NextDraft(NamedTuple):
    """A draft's length, and whether the tokens that it lacks come from the text instead of the model."""

    length: int
    is_from_text: bool


class _Acceptance:
    """The share of tokens that were right, on top of what is known beforehand. Counts have weights."""

    def __init__(self, accepted: float, trials: float) -> None:
        self._prior = accepted, trials
        self._accepted, self._trials = 0.0, 0.0

    def rate(self, weight: float) -> float:
        """Returns the share where a token of this weight counts once."""
        accepted, trials = self._prior
        return (accepted + self._accepted / weight) / (trials + self._trials / weight)

    def add(self, is_right: bool, weight: float) -> None:
        self._accepted += weight * is_right
        self._trials += weight

    def divide(self, weight: float) -> None:
        """Makes a token of this weight one of weight 1."""
        self._accepted /= weight
        self._trials /= weight


class DraftLength:
    """Chooses the drafts of one sequence, which runs alone or in step with others.

    Every drafted token has a *match*: the number of tokens before it that the text had before, `FORCED_MATCH`, or 0 if
    the model drafted it. The model's tokens, and forced ones, are counted when they are verified. What the text
    proposes is compared with every token of the output, drafted or not.

    Args:
        draft_cost: expected cost of a token that the model drafts before any was, as a share of a full-depth token.
        verification_costs: cost of the verifying pass by a draft's length, likewise; see `every_length`. The longest is
            the most that a draft may have.
        least_gain: expected gain below which nothing is drafted.
        second_row: what a second row adds to a drafting pass, as a share of the first.
    """

    def __init__(
        self,
        draft_cost: float,
        verification_costs: Mapping[int, float],
        least_gain: float = LEAST_GAIN,
        second_row: float = USUAL_SECOND_ROW,
    ) -> None:
        self._alone = DraftCosts(0.0, range(MOST_BY_MODEL + 1), every_length(verification_costs))
        self._costs, self.longest = self._alone, len(self._alone.verification)
        """`longest`: the most tokens that a draft may have."""
        self._least_gain = least_gain
        self._second_row = second_row
        self._model = _Acceptance(*_MODEL_PRIOR)
        self._forced = _Acceptance(*_FORCED_PRIOR)
        self._text = [_Acceptance(prior * _TEXT_TRIALS, _TEXT_TRIALS) for prior in _TEXT_PRIORS]
        self._weight = 1.0
        """Weight of the tokens that are counted now. It grows, which makes the earlier ones fade."""
        self._draft_cost, self._num_drafted = draft_cost, 1

    def pay(self, costs: DraftCosts | None) -> None:
        """Takes the costs of the next draft; None: those of a sequence that runs alone."""
        self._costs = costs or self._alone
        self.longest = min(len(self._costs.verification), len(self._alone.verification))

    def acceptance(self, match: int = 0) -> float:
        """Returns the estimated probability that a drafted token is accepted if those before it were."""
        return self._counts(match).rate(self._weight)

    def next(
        self, num_tokens_left: int, matches: Sequence[int] = (), match: int = 0, passes: int | None = None
    ) -> NextDraft:
        """Returns how to go on with a draft, by the expected output for its cost; a length of 0 is none at all.

        Args:
            num_tokens_left: tokens that may still be put out. A verification puts out one more than the draft has.
            matches: of the tokens that were drafted so far.
            match: of the token that the text proposes next; 0 if it proposes none.
            passes: passes that will draft before the verification, whether this sequence drafts in them or not; None if
                it decides that itself.
        """
        drafted, paid = len(matches), passes or 0
        room = min(self.longest, num_tokens_left - 1) - drafted
        best = NextDraft(drafted, False)
        best_gain = self._gain(matches, paid) if drafted or paid else self._least_gain
        num_paid = matches.count(0) + paid
        by_model = range(1, max(0, min(room, MOST_BY_MODEL - drafted if passes is None else passes)) + 1)
        costs = [self._cost_of(num_paid + (more if passes is None else 0)) for more in by_model]
        continuations = (
            (False, repeat(self.acceptance()), costs),
            (
                True,
                map(self.acceptance, range(match, match + room if match else match)),
                repeat(self._cost_of(num_paid)),
            ),
        )
        for is_from_text, acceptances, drafting_costs in continuations:
            num_more, gain = self._best_continuation(matches, acceptances, drafting_costs)
            if gain > best_gain:
                best, best_gain = NextDraft(drafted + num_more, is_from_text), gain
        return best

    def _best_continuation(
        self, matches: Sequence[int], acceptances: Iterable[float], costs: Iterable[float]
    ) -> tuple[int, float]:
        """Returns how many more tokens of these acceptances gain most, and what they gain. `costs` are those of
        drafting, all in all, for each number of more tokens."""
        expected, chance = self._expected(matches)
        drafted = len(matches)
        best, best_gain = 0, 0.0
        for num_more, (acceptance, cost) in enumerate(zip(acceptances, costs, strict=False), start=1):
            chance *= acceptance
            expected += chance
            gain = expected / (cost + self._costs.verification[drafted + num_more])
            if gain > best_gain:
                best, best_gain = num_more, gain
            elif num_more >= best + _PATIENCE:
                break
        return best, best_gain

    def expected(self, matches: Iterable[int]) -> float:
        """Returns the expected output of verifying tokens with these matches."""
        return self._expected(matches)[0]

    def pays(self, matches: Sequence[int], passes: int | None = None) -> bool:
        """Returns True if verifying a draft of tokens with these matches gains anything."""
        return self._gain(matches, passes or 0) >= self._least_gain

    def _cost_of(self, num_by_model: int) -> float:
        """Returns the cost of drafting so many tokens with the model."""
        offset, drafts, _ = self._costs
        return offset * num_by_model + self._draft_cost * drafts[num_by_model]

    def _gain(self, matches: Sequence[int], paid: int) -> float:
        """Returns the gain of verifying these tokens, or none, after so many more passes."""
        verification = self._costs.verification[len(matches)] if matches else 1.0
        return self.expected(matches) / (self._cost_of(matches.count(0) + paid) + verification)

    def guess_pays(self, match: int) -> bool:
        """Returns True if the model should run the text's next token, with this match, in the pass that drafts it: a
        token that was guessed right saves a pass."""
        return match > 0 and self.acceptance(match) > self._second_row

    def drafted(self, cost: float) -> None:
        """Counts a token that the model drafted at `cost` of a full-depth one; 0 for one whose pass was paid for."""
        self._num_drafted += 1
        self._draft_cost += (cost - self._draft_cost) / self._num_drafted

    def verified(self, matches: Sequence[int], num_accepted: int) -> None:
        """Counts a verification of drafted tokens, given by their matches. Those without a draft count too."""
        self.put_out(num_accepted + 1)
        self.checked(matches, num_accepted)

    def put_out(self, num_tokens: int) -> None:
        """Makes what was counted so far fade, as so much output makes it."""
        self._weight /= max(_KEPT_PER_TOKEN**num_tokens, 1 / _LARGEST_WEIGHT)
        if self._weight > _LARGEST_WEIGHT:
            for counts in (self._model, self._forced, *self._text):
                counts.divide(self._weight)
            self._weight = 1.0

    def checked(self, matches: Sequence[int], num_right: int) -> None:
        """Counts drafted tokens, given by their matches, of which the first `num_right` were right."""
        for place, match in enumerate(matches[: num_right + 1]):
            if match in (0, FORCED_MATCH):
                self._counts(match).add(place < num_right, self._weight)

    def followed(self, match: int, is_right: bool) -> None:
        """Counts an output token for which the text had another token, or the same."""
        self._counts(match).add(is_right, self._weight)

    def _expected(self, matches: Iterable[int]) -> tuple[float, float]:
        return expected_output(self.acceptance(match) for match in matches)

    def _counts(self, match: int) -> _Acceptance:
        if match == FORCED_MATCH:
            return self._forced
        return self._text[bisect_right(MATCHES, match) - 1] if match else self._model
