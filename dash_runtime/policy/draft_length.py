"""How many tokens to draft before the next verification, from what was accepted so far.

From counts and fixed costs only, never from the clock, so that a run repeats. Knows counts and costs; knows no tokens,
no tensors and no policies. Imports no torch.
"""

from collections.abc import Mapping

DRAFT_LENGTHS = (1, 3, 7, 15)
"""Those that a draft may be given: with the token before them, rows that a device takes in one stride."""
USUAL_LENGTHS = (3, 7)
USUAL_VERIFICATION_COST = 1.4
"""Of a draft of usual length, over a full-depth token: what a calibration, which knows no device, reckons with."""
LEAST_GAIN = 1.05
"""Below it nothing is drafted: what is gained would not pay for what is not in the costs."""
_PRIOR_ACCEPTED, _PRIOR_TRIALS = 9.0, 10.0
"""A new sequence counts as one that had nine of ten drafted tokens accepted: two failed drafts at the start are enough
to go on without."""
_KEPT_PER_TOKEN = 0.99
"""Of the counts, for each token of output, so that a sequence that was hard and is not any more is tried again."""


def drafting_gain(acceptance: float, draft_cost: float, length: int, verification_cost: float) -> float:
    """Tokens per full-depth token's time of drafting `length` tokens at a time (Leviathan et al. 2023, theorem 3.8).

    Args:
        acceptance: the probability that a drafted token is accepted, given that those before it were.
        draft_cost: of one drafted token, as a share of a full-depth token's time.
        verification_cost: of the pass that verifies them, likewise.
    """
    expected = length + 1.0 if acceptance >= 1 else (1 - acceptance ** (length + 1)) / (1 - acceptance)
    return expected / (length * draft_cost + verification_cost)


class DraftLength:
    """Chooses the lengths of one sequence's drafts.

    Args:
        draft_cost: what a drafted token is expected to cost before any was drafted, as a share of a full-depth token.
        verification_costs: of the pass that verifies a draft, likewise, for each length that a draft may have.
        least_gain: below which nothing is drafted.
    """

    def __init__(
        self, draft_cost: float, verification_costs: Mapping[int, float], least_gain: float = LEAST_GAIN
    ) -> None:
        self._verification_costs = verification_costs
        self._least_gain = least_gain
        self._accepted, self._trials = 0.0, 0.0
        self._draft_cost, self._num_drafted = draft_cost, 1

    @property
    def acceptance(self) -> float:
        """The estimate for the next drafted token."""
        return (_PRIOR_ACCEPTED + self._accepted) / (_PRIOR_TRIALS + self._trials)

    def next(self, num_tokens_left: int) -> int:
        """The length of the next draft, 0 for none, where `num_tokens_left` may still be put out: a verification puts
        out one more than what was drafted."""
        gains = {0: self._least_gain} | {
            length: drafting_gain(self.acceptance, self._draft_cost, length, cost)
            for length, cost in self._verification_costs.items()
            if length < num_tokens_left
        }
        return max(gains, key=gains.__getitem__)

    def drafted(self, cost: float) -> None:
        """Counts a drafted token that cost `cost` of a full-depth one."""
        self._num_drafted += 1
        self._draft_cost += (cost - self._draft_cost) / self._num_drafted

    def verified(self, num_accepted: int, was_rejected: bool) -> None:
        """Counts a verification: so many accepted, and then one rejected or none. Nothing drafted counts too."""
        kept = _KEPT_PER_TOKEN ** (num_accepted + 1)
        self._accepted = self._accepted * kept + num_accepted
        self._trials = self._trials * kept + num_accepted + was_rejected
