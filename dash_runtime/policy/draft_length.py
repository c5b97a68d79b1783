"""Chooses who drafts before the next verification and how far, from what was accepted so far.

It uses counts and fixed costs, never the clock, so that a run repeats. Knows counts and costs; knows no tokens, no
tensors and no policies. Imports no torch.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

DRAFT_LENGTHS = (1, 3, 7, 15)
"""Lengths that a draft may have. With the token before it, a draft fills as many rows as a device runs at once."""
USUAL_LENGTHS = (3, 7)
USUAL_VERIFICATION_COST = 1.4
"""Cost of verifying a draft of usual length, over a full-depth token. Calibration assumes it: it knows no device."""
LEAST_GAIN = 1.05
"""Expected gain below which nothing is drafted: so small a gain would not pay for what the costs leave out."""
_MODEL_PRIOR = (9.0, 10.0)
"""A new sequence starts as if nine of ten tokens that the model drafted had been accepted. Two failed drafts then stop
that."""
_MATCHES = (1, 2, 3, 4, 5, 7, 10)
"""The least lengths of the matches that are counted together."""
_TEXT_PRIORS = (0.2, 0.4, 0.45, 0.55, 0.65, 0.75, 0.88)
"""The share of tokens after such a match that came again, in 800 texts of the embedded model."""
_TEXT_TRIALS = 5.0
"""Trials that these stand for in a new sequence."""
FORCED_MATCH = 1 << 20
"""The match of a token that a constraint forces."""
_FORCED_RATE = 0.97
"""Full depth may still split the forced text into other tokens."""
_KEPT_PER_TOKEN = 0.99
"""Share of the counts that each token of output leaves, so that a sequence that was hard is tried again later."""


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


def cost_of_verifying(costs: Mapping[int, float], length: int) -> float:
    """Returns the cost for a draft of any length: that of the next longer one in `costs`, which ascend."""
    return next(cost for longer, cost in costs.items() if longer >= length)


class NextDraft(NamedTuple):
    """A draft's length, and whether the tokens that it lacks come from the text instead of the model."""

    length: int
    is_from_text: bool


class _Acceptance:
    """The share of tokens that were right, on top of what is known beforehand."""

    def __init__(self, accepted: float, trials: float) -> None:
        self._prior = accepted, trials
        self._accepted, self._trials = 0.0, 0.0

    @property
    def rate(self) -> float:
        accepted, trials = self._prior
        return (accepted + self._accepted) / (trials + self._trials)

    def fade(self, kept: float) -> None:
        self._accepted *= kept
        self._trials *= kept

    def add(self, is_right: bool) -> None:
        self._accepted += is_right
        self._trials += 1


class DraftLength:
    """Chooses the drafts of one sequence.

    Every drafted token has a *match*: the number of tokens before it that the text had before, `FORCED_MATCH`, or 0 if
    the model drafted it. The model's tokens are counted when they are verified. What the text proposes is compared with
    every token of the output, drafted or not.

    Args:
        draft_cost: expected cost of a token that the model drafts before any was, as a share of a full-depth token.
        verification_costs: cost of the verifying pass, likewise, for each length that a draft may have, ascending.
        least_gain: expected gain below which nothing is drafted.
    """

    def __init__(
        self, draft_cost: float, verification_costs: Mapping[int, float], least_gain: float = LEAST_GAIN
    ) -> None:
        self._verification_costs = verification_costs
        self._least_gain = least_gain
        self._model = _Acceptance(*_MODEL_PRIOR)
        self._text = [_Acceptance(prior * _TEXT_TRIALS, _TEXT_TRIALS) for prior in _TEXT_PRIORS]
        self._draft_cost, self._num_drafted = draft_cost, 1

    @property
    def longest(self) -> int:
        """The most tokens that a draft may have."""
        return max(self._verification_costs, default=0)

    def acceptance(self, match: int = 0) -> float:
        """Returns the estimated probability that a drafted token is accepted if those before it were."""
        return _FORCED_RATE if match == FORCED_MATCH else self._counts(match).rate

    def next(self, num_tokens_left: int, matches: Sequence[int] = (), match: int = 0) -> NextDraft:
        """Returns how to go on with a draft, by the expected output for its cost; a length of 0 is none at all.

        Args:
            num_tokens_left: tokens that may still be put out. A verification puts out one more than the draft has.
            matches: of the tokens that were drafted so far.
            match: of the token that the text proposes next; 0 if it proposes none.
        """
        drafted = len(matches)
        expected, chance = self._expected(matches)
        cost = self._draft_cost * matches.count(0)
        gains = {NextDraft(0, False): self._least_gain}
        if drafted:
            gains = {NextDraft(drafted, False): self._gain(matches)}
        for length, verification_cost in self._verification_costs.items():
            if not drafted < length < num_tokens_left:
                continue
            more = length - drafted
            by_model = expected + chance * (self._expected((0,) * more)[0] - 1)
            gains[NextDraft(length, False)] = by_model / (cost + self._draft_cost * more + verification_cost)
            if match:
                by_text = expected + chance * (self._expected(range(match, match + more))[0] - 1)
                gains[NextDraft(length, True)] = by_text / (cost + verification_cost)
        return max(gains, key=gains.__getitem__)

    def pays(self, matches: Sequence[int]) -> bool:
        """Returns True if verifying a draft of tokens with these matches gains anything."""
        return self._gain(matches) >= self._least_gain

    def _gain(self, matches: Sequence[int]) -> float:
        cost = self._draft_cost * matches.count(0) + cost_of_verifying(self._verification_costs, len(matches))
        return self._expected(matches)[0] / cost

    def drafted(self, cost: float) -> None:
        """Counts a token that the model drafted at `cost` of a full-depth one."""
        self._num_drafted += 1
        self._draft_cost += (cost - self._draft_cost) / self._num_drafted

    def verified(self, matches: Sequence[int], num_accepted: int) -> None:
        """Counts a verification of drafted tokens, given by their matches. Those without a draft count too."""
        kept = _KEPT_PER_TOKEN ** (num_accepted + 1)
        for counts in (self._model, *self._text):
            counts.fade(kept)
        for place, match in enumerate(matches[: num_accepted + 1]):
            if not match:
                self._model.add(place < num_accepted)

    def followed(self, match: int, is_right: bool) -> None:
        """Counts an output token for which the text had another token, or the same."""
        self._counts(match).add(is_right)

    def _expected(self, matches: Iterable[int]) -> tuple[float, float]:
        return expected_output(self.acceptance(match) for match in matches)

    def _counts(self, match: int) -> _Acceptance:
        return self._text[bisect_right(_MATCHES, match) - 1] if match else self._model
