"""Chooses how many tokens to draft before the next verification, from what was accepted so far.

It uses counts and fixed costs, never the clock, so that a run repeats. Knows counts and costs; knows no tokens, no
tensors and no policies. Imports no torch.
"""

from collections.abc import Mapping

DRAFT_LENGTHS = (1, 3, 7, 15)
"""Lengths that a draft may have. With the token before it, a draft fills as many rows as a device runs at once."""
USUAL_LENGTHS = (3, 7)
USUAL_VERIFICATION_COST = 1.4
"""Cost of verifying a draft of usual length, over a full-depth token. Calibration assumes it: it knows no device."""
LEAST_GAIN = 1.05
"""Expected gain below which nothing is drafted: so small a gain would not pay for what the costs leave out."""
_PRIOR_ACCEPTED, _PRIOR_TRIALS = 9.0, 10.0
"""A new sequence starts as if nine of ten drafted tokens had been accepted. Two failed drafts then stop drafting."""
_KEPT_PER_TOKEN = 0.99
"""Share of the counts that each token of output leaves, so that a sequence that was hard is tried again later."""


def drafting_gain(acceptance: float, draft_cost: float, length: int, verification_cost: float) -> float:
    """Returns the speed of drafting `length` tokens at a time, over full depth's (Leviathan et al. 2023, theorem 3.8).

    Args:
        acceptance: the probability that a drafted token is accepted if those before it were.
        draft_cost: cost of one drafted token, as a share of a full-depth token.
        verification_cost: cost of the pass that verifies them, likewise.
    """
    expected = length + 1.0 if acceptance >= 1 else (1 - acceptance ** (length + 1)) / (1 - acceptance)
    return expected / (length * draft_cost + verification_cost)


class DraftLength:
    """Chooses the lengths of one sequence's drafts.

    Args:
        draft_cost: expected cost of a drafted token before any was drafted, as a share of a full-depth token.
        verification_costs: cost of the verifying pass, likewise, for each length that a draft may have.
        least_gain: expected gain below which nothing is drafted.
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
        """Estimated probability that the next drafted token is accepted."""
        return (_PRIOR_ACCEPTED + self._accepted) / (_PRIOR_TRIALS + self._trials)

    def next(self, num_tokens_left: int) -> int:
        """Returns the length of the next draft, 0 for none, if `num_tokens_left` may still be put out.

        A verification puts out one token more than the draft has.
        """
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
        """Counts a verification that accepted so many tokens and rejected the next one or none. Verifications without
        a draft count too."""
        kept = _KEPT_PER_TOKEN ** (num_accepted + 1)
        self._accepted = self._accepted * kept + num_accepted
        self._trials = self._trials * kept + num_accepted + was_rejected
