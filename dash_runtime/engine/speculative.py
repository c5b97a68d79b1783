"""EXACT: a policy or the text itself drafts tokens, one full-depth pass verifies them, and the output is full depth's.

Greedy: a drafted token is accepted if full depth prefers it too. Sampled: speculative sampling (Leviathan et al. 2023,
Chen et al. 2023), which leaves the distribution as it is. Logits processors, temperature and truncation apply to both
distributions. Knows one sequence's tokens and distributions; knows no decoder, no cache and no batch.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dash_runtime.engine.sampling import Sampler
from dash_runtime.events import SpeculationStatistics
from dash_runtime.policy.draft_length import FORCED_MATCH, DraftCosts, DraftLength


class Proposal(NamedTuple):
    """Tokens that a source proposes, and how many tokens before them speak for it (`DraftLength`)."""

    token_ids: list[int]
    match: int


class WantedDraft(NamedTuple):
    """A draft that a sequence would make, by the model or without it."""

    num_by_model: int
    num_free: int
    expected: float
    """The output of verifying the free tokens."""


class DraftSource(Protocol):
    """Drafts without the model."""

    def append(self, token_id: int) -> None:
        """Takes in the next output token."""

    def propose(self, drafted: Sequence[int], count: int) -> Proposal:
        """Returns `count` tokens to follow the output and these drafted ones, or none."""


class ForcedText(Protocol):
    """Knows what the output has to go on with, drafted tokens counted in (a constraint does)."""

    def forced(self, count: int) -> list[int]:
        """Returns at most `count` tokens."""


class Speculation:
    """The drafts of one sequence.

    `token_ids` is the current draft. It is complete once it has `length` tokens. Counts are over all drafts.
    """

    def __init__(
        self, sampler: Sampler, lengths: DraftLength, text: DraftSource, forced: ForcedText | None = None
    ) -> None:
        self._sampler = sampler
        self._forced = forced
        self._lengths = lengths
        self._text = text
        self._matches: list[int] = []
        self._num_tokens_left = 0
        self._passes: int | None = None
        """Passes that the draft has to share with other sequences' drafts; None if it runs alone."""
        self._proposed = Proposal([], 0)
        """The tokens of the text that would follow the draft so far."""
        self._distributions: list[Tensor | None] = []
        """The distribution of each drafted token; None if it came without the model, or if the sampler is greedy."""
        self.token_ids: list[int] = []
        self.length = 0
        self.num_drafted = 0
        self.num_drafted_from_text = 0
        self.num_accepted_from_text = 0
        self.accepted_lengths: list[int] = []
        """For each number of accepted tokens, the number of verified drafts of which so many were."""
        self.draft_ns = 0
        """Time of the steps that drafted, shared with the rows that ran beside it."""
        self.verification_ns = 0

    @property
    def is_drafting(self) -> bool:
        """True if the current draft lacks tokens."""
        return len(self.token_ids) < self.length

    @property
    def num_from_text(self) -> int:
        """Tokens of the current draft that came from the text."""
        return _num_from_text(self._matches)

    def append(self, token_id: int) -> None:
        """Takes in the next output token."""
        follow(self._text, token_id, self._lengths)

    def wanted(self, num_tokens_left: int, costs: DraftCosts | None) -> WantedDraft:
        """Returns the draft that would gain most at these costs."""
        self._lengths.pay(costs)
        self._num_tokens_left, self._passes = num_tokens_left, None
        matches: Sequence[int] = [FORCED_MATCH] * len(self._forced_tokens(None))
        if not matches:
            match = self._text.propose((), 1).match
            length, is_from_text = self._lengths.next(num_tokens_left, match=match)
            if not is_from_text:
                return WantedDraft(length, 0, 1.0)
            matches = range(match, match + length)
        return WantedDraft(0, len(matches), self._lengths.expected(matches))

    def begin(self, num_tokens_left: int, costs: DraftCosts | None = None, passes: int | None = None) -> None:
        """Chooses the next draft. One from the text is then complete; a `length` of 0 means none.

        Args:
            costs: what the draft costs beside other sequences; None if this one is alone.
            passes: passes in which it and others draft before the verification; None if it chooses their number.
        """
        assert not self.token_ids
        self._lengths.pay(costs)
        self._num_tokens_left, self._passes = num_tokens_left, passes
        self.go_on()

    def go_on(self) -> None:
        """Chooses how the draft goes on: no further, by the model, or without it, which completes it at once."""
        passes = None if self._passes is None else max(0, self._passes - self._matches.count(0))
        if forced := self._forced_tokens(passes):
            for token_id in forced:
                self._add(token_id, FORCED_MATCH, None)
            self.length = len(self.token_ids)
            return
        self._proposed = proposed = self._text.propose(self.token_ids, self._lengths.longest - len(self.token_ids))
        self.length, is_from_text = self._lengths.next(self._num_tokens_left, self._matches, proposed.match, passes)
        if not is_from_text:
            return
        for place, token_id in enumerate(proposed.token_ids[: self.length - len(self.token_ids)]):
            self._add(token_id, proposed.match + place, None)

    def guess(self) -> int | None:
        """Returns the text's next token if the model should run it beside the draft's last one, and draft two."""
        has_room = self._passes is None and self.length - len(self.token_ids) > 1
        return self._proposed.token_ids[0] if has_room and self._lengths.guess_pays(self._proposed.match) else None

    def _forced_tokens(self, passes: int | None) -> list[int]:
        """Returns the tokens that the output has to go on with, if verifying them pays."""
        if self._forced is None:
            return []
        room = min(self._lengths.longest, self._num_tokens_left - 1) - len(self.token_ids)
        forced = self._forced.forced(room) if room > 0 else []
        return forced if self._lengths.pays([*self._matches, *[FORCED_MATCH] * len(forced)], passes) else []

    def draft(self, logits: Tensor | None, cost: float, likeliest_id: int | None = None) -> int:
        """Adds and returns the next token of the draft.

        Args:
            logits: the drafting path's, float32 `[vocab_size]`; None if the sampler takes the likeliest.
            cost: the token's cost on this device, as a share of a full-depth token.
            likeliest_id: the token of the largest logit, if it is known.
        """
        sampler, distribution = self._sampler, None
        if sampler.is_greedy:
            token_id = sampler.best(logits, likeliest_id)
        else:
            assert logits is not None
            distribution = sampler.distribution(logits)
            token_id = sampler.draw_weighed(distribution)
        self._add(token_id, 0, distribution)
        self._lengths.drafted(cost)
        return token_id

    def end_draft(self) -> None:
        """Completes the draft early: the sequence ends with the token drafted last."""
        self.length = len(self.token_ids)

    def verify(self, logits: Tensor | None, likeliest: Sequence[int] | None = None) -> list[int]:
        """Ends the draft and returns the accepted tokens, and one more that full depth chose itself.

        `logits` are full depth's, float32 `[drafted + 1, vocab_size]`: after the token before the draft, and after each
        drafted token. `likeliest` are the tokens of each row's largest, if they are known. A sampler that takes the
        likeliest needs only these.
        """
        drafted, distributions, matches = self.token_ids, self._distributions, self._matches
        self.token_ids, self._distributions, self._matches, self.length = [], [], [], 0
        self._sampler.rollback(drafted)
        if self._sampler.is_greedy:
            token_ids = self._greedy(drafted, logits, likeliest)
        else:
            assert logits is not None
            token_ids = self._sampled(drafted, distributions, logits)
        num_accepted = len(token_ids) - 1
        self._lengths.verified(matches, num_accepted)
        if drafted:
            self.num_accepted_from_text += _num_from_text(matches[:num_accepted])
            missing = num_accepted + 1 - len(self.accepted_lengths)
            self.accepted_lengths += [0] * missing
            self.accepted_lengths[num_accepted] += 1
        return token_ids

    def decoded(self) -> None:
        """Takes note of a token that full depth chose where nothing was drafted."""
        self._lengths.verified((), 0)

    def statistics(self) -> SpeculationStatistics:
        """Returns the counts and times so far."""
        return SpeculationStatistics(
            num_drafted=self.num_drafted,
            num_drafted_from_text=self.num_drafted_from_text,
            num_accepted_from_text=self.num_accepted_from_text,
            accepted_lengths=list(self.accepted_lengths),
            draft_ns=self.draft_ns,
            verification_ns=self.verification_ns,
        )

    def _add(self, token_id: int, match: int, distribution: Tensor | None) -> None:
        self._sampler.accept(token_id)
        self.token_ids.append(token_id)
        self._matches.append(match)
        self._distributions.append(distribution)
        self.num_drafted += 1
        self.num_drafted_from_text += match > 0

    def _greedy(self, drafted: Sequence[int], logits: Tensor | None, likeliest: Sequence[int] | None) -> list[int]:
        sampler = self._sampler
        chosen: list[int] = []
        for place in range(len(drafted) + 1):
            own = None if logits is None else logits[place]
            token_id = sampler.best(own, None if likeliest is None else likeliest[place])
            sampler.accept(token_id)
            chosen.append(token_id)
            if drafted[place : place + 1] != [token_id]:
                break
        return chosen

    def _sampled(self, drafted: Sequence[int], distributions: Sequence[Tensor | None], logits: Tensor) -> list[int]:
        sampler = self._sampler
        chosen: list[int] = []
        for place, (token_id, distribution) in enumerate(zip(drafted, distributions, strict=True)):
            wanted = sampler.distribution(logits[place])
            proposed = _certain(token_id, len(wanted)) if distribution is None else distribution
            is_accepted = sampler.chance(float(wanted[token_id] / proposed[token_id]))
            if not is_accepted:
                token_id = sampler.draw_weighed(self._left_over(wanted, proposed))
            sampler.accept(token_id)
            chosen.append(token_id)
            if not is_accepted:
                return chosen
        token_id = sampler.draw_weighed(sampler.distribution(logits[len(drafted)]))
        sampler.accept(token_id)
        return [*chosen, token_id]

    @staticmethod
    def _left_over(wanted: Tensor, proposed: Tensor) -> Tensor:
        """Returns the weights to replace a rejected token: how much more full depth wants than was proposed."""
        weights = (wanted - proposed).clamp_min(0)
        return weights if weights.any() else wanted  # rounding may leave only zeros


def follow(text: DraftSource, token_id: int, lengths: DraftLength) -> None:
    """Tells a source the next output token, and counts whether it had proposed that one."""
    proposed = text.propose((), 1)
    if proposed.match:
        lengths.followed(proposed.match, proposed.token_ids[0] == token_id)
    text.append(token_id)


def _num_from_text(matches: Sequence[int]) -> int:
    return len(matches) - matches.count(0)


def _certain(token_id: int, vocab_size: int) -> Tensor:
    """Returns the distribution of a source that can only propose this token."""
    distribution = torch.zeros(vocab_size)
    distribution[token_id] = 1
    return distribution
