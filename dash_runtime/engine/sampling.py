"""Chooses a token from logits: logits processors, temperature, truncation, and a seeded draw per sequence.

Knows one row of logits; knows no batch and no text. A sequence's draws depend on its seed and its own logits
only.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dash_runtime.config import SamplingParameters
from dash_runtime.devices import device_of
from dash_runtime.engine.logits_processors import LogitsProcessor, make_processors
from dash_runtime.engine.scores import HostScores, Scores, device_scores, likeliest
from dash_runtime.events import TokenLogprobs

_TOP_P_CANDIDATES = 1024
"""Sorting the whole vocabulary costs more than a layer; most nuclei lie within the first thousand."""


class Sampler:
    """Draws the tokens of one sequence.

    Args:
        more_processors: applied after those that `parameters` ask for.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        prompt_token_ids: Iterable[int],
        more_processors: Iterable[LogitsProcessor] = (),
    ) -> None:
        self._parameters = parameters
        self._generator = torch.Generator().manual_seed(parameters.seed)
        self._processors = [*make_processors(parameters, prompt_token_ids), *more_processors]
        self.is_greedy = parameters.temperature == 0
        """True if nothing is left to chance."""
        self.is_plain_greedy = self.is_greedy and not self._processors
        """True if the token is simply the one of the largest logit."""

    def sample(self, logits: Tensor) -> int:
        """Returns the next token, and accepts it. The float32 `[vocab_size]` logits stay as they are."""
        return self.choose(self.scores(logits))

    def choose(self, scores: Scores) -> int:
        """Returns the next token, and accepts it."""
        token_id = scores.best() if self.is_greedy else self._draw(scores)
        self.accept(token_id)
        return token_id

    def takes(self, likeliest_id: int) -> bool:
        """True if the token of the largest logit is the next one whatever the others are, which takes a fiftieth of
        the time of adjusting all logits."""
        return self.is_greedy and all(processor.leaves_first(likeliest_id) for processor in self._processors)

    def adjust(self, logits: Tensor) -> None:
        """Changes float32 `[vocab_size]` logits as processors and temperature ask for, on their device."""
        for processor in self._processors:
            processor.process(logits)
        if not self.is_greedy:
            logits.div_(self._parameters.temperature)

    def scores(self, logits: Tensor) -> HostScores:
        """Returns what `choose` takes, from logits that stay as they are."""
        processed = self._processed(logits)
        return HostScores(processed if self.is_greedy else processed / self._parameters.temperature)

    def best(self, logits: Tensor, likeliest_id: int | None = None) -> int:
        """Returns the token that a greedy sequence takes; `logits` as in `sample`, and the token of the largest one
        where it is known."""
        if likeliest_id is not None and self.takes(likeliest_id):
            return likeliest_id
        return likeliest(logits if self.is_plain_greedy else self._processed(logits))

    def distribution(self, logits: Tensor) -> Tensor:
        """Returns the probabilities that `sample` draws from, float32 `[vocab_size]` on the host."""
        candidates, ids = self._truncate(self.scores(logits))
        probabilities = torch.softmax(candidates, dim=-1)
        return probabilities if ids is None else torch.zeros(len(logits)).scatter_(0, ids, probabilities)

    def draw(self, weights: Tensor) -> int:
        """Draws a token from weights `[vocab_size]` that need not add up to 1."""
        return int(torch.multinomial(weights, 1, generator=self._generator))

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return float(torch.rand((), generator=self._generator)) < probability

    def accept(self, token_id: int) -> None:
        """Tells the processors the next output token."""
        for processor in self._processors:
            processor.accept(token_id)

    def rollback(self, token_ids: Sequence[int]) -> None:
        """Takes back the tokens that were accepted last, given in that order."""
        for processor in self._processors:
            processor.rollback(token_ids)

    def _processed(self, logits: Tensor) -> Tensor:
        """The processors' result on the host; without processors it may be `logits`."""
        if not self._processors:
            return logits.cpu()
        processed = logits.to("cpu", copy=True)
        for processor in self._processors:
            processor.process(processed)
        return processed

    def _draw(self, scores: Scores) -> int:
        candidates, ids = self._truncate(scores)
        probabilities = torch.softmax(candidates, dim=-1)
        place = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return place if ids is None else int(ids[place])

    def _truncate(self, scores: Scores) -> tuple[Tensor, Tensor | None]:
        """The logits that may be drawn and their token ids, best first; None for all, in order."""
        p = self._parameters
        vocab_size = scores.vocab_size
        top_k = min(p.top_k, vocab_size) if p.top_k else vocab_size
        if top_k == vocab_size and p.top_p >= 1 and p.min_p == 0:
            return scores.whole(), None
        kept = min(top_k, _TOP_P_CANDIDATES)
        values, ids = scores.top(kept)
        total = values.logsumexp(0) if kept == top_k else scores.total()
        is_short = kept < top_k and not self._ends_within(values, total)
        if is_short:
            values, ids = scores.top(top_k)
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


class GivenTokens(Sampler):
    """Puts out the tokens of an output that is given."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        super().__init__(SamplingParameters(), ())
        self.is_plain_greedy = False
        self._token_ids = iter(token_ids)

    def choose(self, scores: Scores) -> int:
        return next(self._token_ids)

    def takes(self, likeliest_id: int) -> bool:
        return False


def scores_of(logits: Tensor, samplers: Mapping[int, Sampler]) -> Mapping[int, Scores]:
    """Returns what samplers choose from, by row of `[rows, vocab_size]`, which stay as they are.

    On a device with memory of its own all rows are adjusted there, and the likeliest tokens come to the host together.
    """
    device = device_of(logits.device)
    if not samplers or not device.has_own_memory:
        return {row: sampler.scores(logits[row]) for row, sampler in samplers.items()}
    own = logits[device.upload(torch.tensor(list(samplers)))]
    for adjusted, sampler in zip(own, samplers.values(), strict=True):
        sampler.adjust(adjusted)
    return dict(zip(samplers, device_scores(own, _TOP_P_CANDIDATES), strict=True))


def token_logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Returns the log probabilities of one token and of the `num_top` best, from raw `[vocab_size]` logits."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprobs(float(logprobs[token_id]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _log(probability: float) -> float:
    return float(torch.tensor(probability).log())
