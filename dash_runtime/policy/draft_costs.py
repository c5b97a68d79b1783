"""The costs of drafts and verifications where several sequences draft, or others decode beside them.

Knows counts and seconds; knows no sequences and no tokens. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate

from dash_runtime.actions import LatencyTable
from dash_runtime.policy.draft_length import MOST_BY_MODEL, DraftCosts, every_length


class RoundCosts:
    """The costs of drafts by the number of sequences.

    A pass reads the weights once for all of its rows. So neighbours make full depth cheaper, and drafts pay less. Every
    sequence in mode EXACT is taken to draft as far as the others, and pays its part. Those in other modes are taken to
    decode at full depth in every pass, and lose nothing by the drafts.

    Args:
        passes: seconds of whole passes in FULL, and in the kernel that drafts, by place in a round; the last holds for
            later ones too (`startup.measure.measure_rounds`).
        usual_cost: cost of a token that this kernel drafts, by the device's cost table.
        verification_costs: cost of verifying a lone sequence's draft by its length, as a share of a full-depth token,
            of some lengths.
        most_rows: rows of a verification that several sequences share, at most.
    """

    def __init__(
        self,
        passes: Sequence[LatencyTable],
        usual_cost: float,
        verification_costs: Mapping[int, float],
        most_rows: int,
    ) -> None:
        self._full = partial(passes[0].cost, max(passes[0].seconds))
        self._drafts = [partial(own.cost, min(own.seconds)) for own in passes]
        self._usual_cost = usual_cost
        lengths = every_length(verification_costs)
        self._by_rows = {1: 1.0} | {length + 1: cost for length, cost in lengths.items()}
        self.most_rows = min(most_rows, max(self._by_rows))
        self.of = lru_cache(self._of)

    def _of(self, num_drafting: int, num_others: int = 0) -> DraftCosts:
        """Returns the costs where so many sequences draft, at least one, and so many others decode."""

        def part(seconds: float) -> float:
            return self._part(num_drafting, num_others, seconds)

        offset = part(0.0)
        seconds = [own(num_drafting) for own in self._drafts]
        seconds += seconds[-1:] * (MOST_BY_MODEL - len(seconds))
        drafts = accumulate(((part(own) - offset) / self._usual_cost for own in seconds), initial=0.0)
        most_rows = max(self._by_rows) if num_drafting == 1 else self.most_rows
        lengths = range(1, most_rows // num_drafting)
        verification = {
            length: self.verification(num_drafting, num_others, num_drafting * (length + 1)) for length in lengths
        }
        return DraftCosts(offset, tuple(drafts), verification)

    def verification(self, num_drafting: int, num_others: int, num_rows: int) -> float:
        """Returns one sequence's part of verifying drafts that have so many rows together."""
        more = self._by_rows[num_rows] - self._by_rows[num_drafting]
        return self._part(num_drafting, num_others, self._full(num_drafting) + self._full(1) * more)

    def _part(self, num_drafting: int, num_others: int, seconds: float) -> float:
        """Returns one drafting sequence's part of a pass, less what the others put out meanwhile."""
        num_all = num_drafting + num_others
        tokens_per_second = num_all / self._full(num_all)
        return max(0.0, (tokens_per_second * (self._full(num_others) + seconds) - num_others) / num_drafting)
