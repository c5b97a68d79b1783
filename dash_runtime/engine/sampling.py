"""From logits to a token: penalties, temperature, truncation, and a seeded draw per sequence.

Knows one row of logits; knows no batch and no text. A sequence's draws depend on its seed and its own logits
only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dash_runtime.config import SamplingParameters

_TOP_P_CANDIDATES = 1024
"""Sorting the whole vocabulary costs more than a layer; most nuclei lie within the first thousand."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """In nats, of the raw logits of the path that ran: before bias, penalties, temperature and truncation."""

    chosen: float
    top: list[tuple[int, float]]


def likeliest(logits: Tensor) -> Any:
    """The token of the largest logit, the first of equal ones: a number for `[vocab_size]`, a list for `[rows,
    vocab_size]`. On a CPU numpy takes a third of the time that torch does, or less."""
    return (logits.argmax(dim=-1) if logits.is_cuda else logits.numpy().argmax(axis=-1)).tolist()


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, parameters: SamplingParameters, prompt_token_ids: Sequence[int]) -> None:
        self._parameters = parameters
        self._generator = torch.Generator().manual_seed(parameters.seed)
        self._prompt_ids = frozenset(prompt_token_ids) if parameters.repetition_penalty != 1 else frozenset()
        self._output_counts: Counter[int] = Counter()
        p = parameters
        self._has_penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
        self.is_plain_greedy = p.temperature == 0 and not p.logit_bias and not self._has_penalties
        """Whether the token is simply the largest logit."""

    def sample(self, logits: Tensor) -> int:
        """The next token from float32 `[vocab_size]` logits, which are left as they are."""
        if self.is_greedy:
            token_id = self.best(logits)
        else:
            token_id = self._draw(self._adjust(logits.cpu()) / self._parameters.temperature)
        self.record(token_id)
        return token_id

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self._parameters.temperature == 0

    def best(self, logits: Tensor) -> int:
        """The token that a greedy sequence takes; `logits` as in `sample`."""
        return likeliest(logits if self.is_plain_greedy else self._adjust(logits.cpu()))

    def distribution(self, logits: Tensor) -> Tensor:
        """What `sample` draws from, float32 probabilities `[vocab_size]` on the host; `logits` as there."""
        candidates, ids = self._truncate(self._adjust(logits.cpu()) / self._parameters.temperature)
        probabilities = torch.softmax(candidates, dim=-1)
        return probabilities if ids is None else torch.zeros(len(logits)).scatter_(0, ids, probabilities)

    def draw(self, weights: Tensor) -> int:
        """A token from weights `[vocab_size]` that need not add up to 1."""
        return int(torch.multinomial(weights, 1, generator=self._generator))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(torch.rand((), generator=self._generator)) < probability

    def record(self, token_id: int) -> None:
        """Counts an output token, for the penalties of later ones."""
        if self._has_penalties:
            self._output_counts[token_id] += 1

    def forget(self, token_ids: Sequence[int]) -> None:
        """Takes back what `record` counted."""
        if self._has_penalties:
            self._output_counts -= Counter(token_ids)

    def _adjust(self, logits: Tensor) -> Tensor:
        p = self._parameters
        adjusted = logits.clone()
        for token_id, bias in p.logit_bias.items():
            adjusted[token_id] += bias
        if p.repetition_penalty != 1:
            # Keskar et al. 2019 (CTRL): makes a seen token less likely whatever its logit's sign.
            seen = torch.tensor(sorted(self._prompt_ids | self._output_counts.keys()))
            values = adjusted[seen]
            factor = p.repetition_penalty
            adjusted[seen] = torch.where(values > 0, values / factor, values * factor)
        if self._output_counts and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(list(self._output_counts.keys()))
            counts = torch.tensor(list(self._output_counts.values()), dtype=adjusted.dtype)
            adjusted[ids] -= p.presence_penalty + p.frequency_penalty * counts
        return adjusted

    def _draw(self, logits: Tensor) -> int:
        candidates, ids = self._truncate(logits)
        probabilities = torch.softmax(candidates, dim=-1)
        place = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return place if ids is None else int(ids[place])

    def _truncate(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits that may be drawn and their token ids, best first; None for all, in order."""
        p = self._parameters
        vocab_size = len(logits)
        top_k = min(p.top_k, vocab_size) if p.top_k else vocab_size
        if top_k == vocab_size and p.top_p >= 1 and p.min_p == 0:
            return logits, None
        kept = min(top_k, _TOP_P_CANDIDATES)
        values, ids = logits.topk(kept)
        total = values.logsumexp(0) if kept == top_k else logits.logsumexp(0)
        is_short = kept < top_k and not self._ends_within(values, total)
        if is_short:
            values, ids = logits.topk(top_k)
            total = values.logsumexp(0)
        probabilities = (values - total).exp()
        before = probabilities.cumsum(0) - probabilities
        allowed = (before < p.top_p) & (values >= values[0] + _log(p.min_p))
        allowed[0] = True
        return values[allowed], ids[allowed]

    def _ends_within(self, values: Tensor, total: Tensor) -> bool:
        p = self._parameters
        reaches_top_p = p.top_p < 1 and bool((values - total).exp().sum() >= p.top_p)
        falls_below_min_p = p.min_p > 0 and bool(values[-1] < values[0] + _log(p.min_p))
        # With an exact top_k beyond the candidates, its renormalisation needs all of them.
        return (reaches_top_p or falls_below_min_p) and p.top_k == 0


def token_logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Log probabilities of one token and of the `num_top` best, from raw `[vocab_size]` logits."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprobs(float(logprobs[token_id]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _log(probability: float) -> float:
    return float(torch.tensor(probability).log())
