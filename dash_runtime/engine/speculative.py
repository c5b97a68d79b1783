"""EXACT: a policy drafts tokens, one full-depth pass verifies them, and the output is full depth's own.

Greedy: a drafted token is accepted if full depth prefers it too. Sampled: speculative sampling (Leviathan et al. 2023,
Chen et al. 2023), which leaves the distribution as it is. Logits processors, temperature and truncation apply to both
distributions. Knows one sequence's tokens and distributions; knows no decoder, no cache and no batch.
"""

from collections.abc import Sequence

from torch import Tensor

from dash_runtime.engine.sampling import Sampler, likeliest
from dash_runtime.events import SpeculationStatistics
from dash_runtime.policy.draft_length import DraftLength


class Speculation:
    """The drafts of one sequence.

    `token_ids` is the current draft. It is complete once it has `length` tokens. Counts are over all drafts.
    """

    def __init__(self, sampler: Sampler, lengths: DraftLength) -> None:
        self._sampler = sampler
        self._lengths = lengths
        self._distributions: list[Tensor] = []
        self.token_ids: list[int] = []
        self.length = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_verifications = 0
        self.draft_ns = 0
        """Time of the steps that drafted, shared with the rows that ran beside it."""
        self.verification_ns = 0

    @property
    def is_drafting(self) -> bool:
        """True if the current draft lacks tokens."""
        return len(self.token_ids) < self.length

    def begin(self, num_tokens_left: int) -> None:
        """Chooses the length of the next draft; 0 means none."""
        assert not self.token_ids
        self.length = self._lengths.next(num_tokens_left)

    def draft(self, logits: Tensor, cost: float) -> int:
        """Adds and returns the next token of the draft, from the drafting path's float32 `[vocab_size]` logits.

        `cost` is the token's cost on this device, as a share of a full-depth token.
        """
        sampler = self._sampler
        if sampler.is_greedy:
            token_id = sampler.best(logits)
        else:
            distribution = sampler.distribution(logits)
            token_id = sampler.draw(distribution)
            self._distributions.append(distribution)
        sampler.accept(token_id)
        self.token_ids.append(token_id)
        self.num_drafted += 1
        self._lengths.drafted(cost)
        return token_id

    def end_draft(self) -> None:
        """Completes the draft early: the sequence ends with the token drafted last."""
        self.length = len(self.token_ids)

    def verify(self, logits: Tensor) -> list[int]:
        """Ends the draft and returns the accepted tokens, and one more that full depth chose itself.

        `logits` are full depth's, float32 `[drafted + 1, vocab_size]`: after the token before the draft, and after each
        drafted token.
        """
        drafted, distributions = self.token_ids, self._distributions
        self.token_ids, self._distributions, self.length = [], [], 0
        self._sampler.rollback(drafted)
        token_ids = (
            self._greedy(drafted, logits) if self._sampler.is_greedy else self._sampled(drafted, distributions, logits)
        )
        num_accepted = len(token_ids) - 1
        self.num_accepted += num_accepted
        self.num_verifications += bool(drafted)
        self._lengths.verified(num_accepted, was_rejected=num_accepted < len(drafted))
        return token_ids

    def statistics(self) -> SpeculationStatistics:
        """Returns the counts and times so far."""
        return SpeculationStatistics(
            self.num_drafted, self.num_accepted, self.num_verifications, self.draft_ns, self.verification_ns
        )

    def _greedy(self, drafted: Sequence[int], logits: Tensor) -> list[int]:
        sampler = self._sampler
        plain = likeliest(logits) if sampler.is_plain_greedy else None
        chosen: list[int] = []
        for place in range(len(drafted) + 1):
            token_id = sampler.best(logits[place]) if plain is None else plain[place]
            sampler.accept(token_id)
            chosen.append(token_id)
            if drafted[place : place + 1] != [token_id]:
                break
        return chosen

    def _sampled(self, drafted: Sequence[int], distributions: Sequence[Tensor], logits: Tensor) -> list[int]:
        sampler = self._sampler
        chosen: list[int] = []
        for place, (token_id, proposed) in enumerate(zip(drafted, distributions, strict=True)):
            wanted = sampler.distribution(logits[place])
            is_accepted = sampler.chance(float(wanted[token_id] / proposed[token_id]))
            if not is_accepted:
                token_id = sampler.draw(self._left_over(wanted, proposed))
            sampler.accept(token_id)
            chosen.append(token_id)
            if not is_accepted:
                return chosen
        token_id = sampler.draw(sampler.distribution(logits[len(drafted)]))
        sampler.accept(token_id)
        return [*chosen, token_id]

    @staticmethod
    def _left_over(wanted: Tensor, proposed: Tensor) -> Tensor:
        """Returns the weights to replace a rejected token: how much more full depth wants than was proposed."""
        weights = (wanted - proposed).clamp_min(0)
        return weights if weights.any() else wanted  # rounding may leave only zeros
