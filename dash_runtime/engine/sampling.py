"""Chooses a token from logits: logits processors, temperature, truncation, and a seeded draw per sequence.

Knows one row of logits; knows no batch and no text. A sequence's draws depend on its seed and its own logits
only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy
import torch
from torch import Tensor

from dash_runtime.config import SamplingParameters
from dash_runtime.devices import device_of
from dash_runtime.engine.logits_processors import LogitsProcessor, make_processors
from dash_runtime.engine.scores import HostScores, Numbers, Scores, device_scores
from dash_runtime.events import TokenLogprobs
from dash_runtime.passes import Draw, DrawTokens

_TOP_P_CANDIDATES = 1024
"""Scores that a device sends at once. Most nuclei lie within the first thousand, and sorting the whole vocabulary costs
more than a layer."""
_WEIGHTS_TOGETHER = 256
"""Weights whose sum a draw looks at before it looks at each of them."""


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
        self._temperature = numpy.float32(parameters.temperature)
        self._generator = torch.Generator().manual_seed(parameters.seed)
        self._ahead: list[float] = []
        """Numbers for tokens that are not drawn yet."""
        self._processors = [*make_processors(parameters, prompt_token_ids), *more_processors]
        self.is_greedy = parameters.temperature == 0
        """True if nothing is left to chance."""
        self.is_plain_greedy = self.is_greedy and not self._processors
        """True if the token is simply the one of the largest logit."""
        self.mostly_takes_likeliest = self.is_greedy and all(
            processor.mostly_leaves_first for processor in self._processors
        )
        """True if the token is nearly always the one of the largest logit."""
        self.is_plain_draw = not self.is_greedy and not self._processors
        """True if `draw` tells all that chooses a token."""

    def sample(self, logits: Tensor) -> int:
        """Returns the next token, and accepts it. The float32 `[vocab_size]` logits stay as they are."""
        return self.choose(self.scores(logits))

    def choose(self, scores: Scores) -> int:
        """Returns the next token, and accepts it."""
        token_id = scores.best() if self.is_greedy else self._draw(scores)
        self.accept(token_id)
        return token_id

    def draw(self) -> Draw:
        """Returns how the next token is drawn, by a number that no other token is drawn by."""
        return self._draw_by(self._number())

    def draws(self, count: int) -> list[Draw]:
        """Returns how each of the next `count` tokens is drawn. `drew` has to be told how many then are."""
        self._ahead += [self._new_number() for _ in range(count - len(self._ahead))]
        return [self._draw_by(number) for number in self._ahead[:count]]

    def drew(self, count: int) -> None:
        """Takes note that the first of the next tokens are drawn."""
        del self._ahead[:count]

    def takes(self, likeliest_id: int) -> bool:
        """True if the token of the largest logit is the next one whatever the others are. To ask takes a fiftieth of
        the time of adjusting all logits."""
        return self.is_greedy and all(processor.leaves_first(likeliest_id) for processor in self._processors)

    def process(self, logits: Tensor) -> None:
        """Changes float32 `[vocab_size]` logits as processors ask for, on their device."""
        for processor in self._processors:
            processor.process(logits)

    def adjust(self, logits: Tensor) -> None:
        """Does `process`, and divides by the temperature."""
        self.process(logits)
        if not self.is_greedy:
            logits.div_(self._parameters.temperature)

    def scores(self, logits: Tensor) -> HostScores:
        """Returns what `choose` takes, from logits that stay as they are."""
        processed = self._processed(logits).numpy()
        return HostScores(processed if self.is_greedy else processed / self._temperature)

    def best(self, logits: Tensor | None, likeliest_id: int | None = None) -> int:
        """Returns the token that a greedy sequence takes; `logits` as in `sample`, and the token of the largest one
        where it is known. A plainly greedy one needs only this."""
        if likeliest_id is not None and self.takes(likeliest_id):
            return likeliest_id
        assert logits is not None
        changed = logits if self.is_plain_greedy else self._processed(logits)
        return int(device_of(changed.device).likeliest(changed))

    def distribution(self, logits: Tensor) -> Tensor:
        """Returns the probabilities that `sample` draws from, float32 `[vocab_size]` on the host."""
        weights, ids = self._weights(self.scores(logits))
        probabilities = weights / weights.sum()
        if ids is not None:
            some, probabilities = probabilities, numpy.zeros(len(logits), numpy.float32)
            probabilities[ids] = some
        return torch.from_numpy(probabilities)

    def draw_weighed(self, weights: Tensor) -> int:
        """Draws a token from weights `[vocab_size]` on the host that need not add up to 1."""
        return self._place(weights.numpy())

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self._number() < probability

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
        self.process(processed)
        return processed

    def _draw_by(self, number: float) -> Draw:
        p = self._parameters
        return Draw(p.temperature, p.top_p, p.min_p, number, p.top_k)

    def _draw(self, scores: Scores) -> int:
        weights, ids = self._weights(scores)
        place = self._place(weights)
        return place if ids is None else int(ids[place])

    def _number(self) -> float:
        """Returns a number from 0 to 1, which is below 1, by which nothing was drawn."""
        return self._ahead.pop(0) if self._ahead else self._new_number()

    def _new_number(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def _place(self, weights: Numbers) -> int:
        """Returns the place of one of these weights, `[n]`, each as often as it is large, by a single number."""
        sums = numpy.add.reduceat(weights, numpy.arange(0, len(weights), _WEIGHTS_TOGETHER), dtype=numpy.float64)
        ends = sums.cumsum()
        aim = self._number() * ends[-1]
        group = _first_above(ends, aim)
        begin = group * _WEIGHTS_TOGETHER
        own = weights[begin : begin + _WEIGHTS_TOGETHER].cumsum(dtype=numpy.float64)
        return begin + _first_above(own, aim - (ends[group] - sums[group]))

    def _weights(self, scores: Scores) -> tuple[Numbers, Numbers | None]:
        """Returns what the tokens that may be drawn weigh, and their ids, best first; None for all, in order."""
        values, ids = self._truncate(scores)
        return numpy.exp(values - values.max()), ids

    def _truncate(self, scores: Scores) -> tuple[Numbers, Numbers | None]:
        """Returns the logits that may be drawn and their token ids, best first; None for all, in order."""
        p = self._parameters
        has_top_k = 0 < p.top_k < scores.vocab_size
        if not has_top_k and p.top_p >= 1 and p.min_p == 0:
            return scores.whole(), None
        values, ids = scores.first()
        if has_top_k:
            if len(values) < p.top_k:
                values, ids = scores.top(p.top_k)
            values, ids = values[: p.top_k], ids[: p.top_k]
            probabilities = numpy.exp(values - values[0])
            probabilities /= probabilities.sum()
        else:
            total = scores.total()
            probabilities = numpy.exp(values - total)
            if not self._ends_within(probabilities):
                values, ids = scores.top(scores.vocab_size)
                probabilities = numpy.exp(values - total)
        is_allowed = probabilities >= p.min_p * probabilities[0]
        if p.top_p < 1:  # else rounding would cut off the last ones
            is_allowed &= probabilities.cumsum() - probabilities < p.top_p
        is_allowed[0] = True
        return values[is_allowed], ids[is_allowed]

    def _ends_within(self, probabilities: Numbers) -> bool:
        """Returns True if no token but these, the likeliest, may be drawn."""
        p = self._parameters
        reaches_top_p = p.top_p < 1 and probabilities.sum() >= p.top_p
        return bool(reaches_top_p or probabilities[-1] < p.min_p * probabilities[0])


class GivenTokens(Sampler):
    """Puts out the tokens of an output that is given."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        super().__init__(SamplingParameters(), ())
        self.is_plain_greedy = self.is_plain_draw = self.mostly_takes_likeliest = False
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


def choose_tokens(
    samplers: Mapping[int, Sampler],
    likeliest_ids: Sequence[int],
    logits: Tensor | None,
    late_logits: Callable[[Sequence[int]], Tensor] | None,
    draw: DrawTokens | None,
) -> Mapping[int, int]:
    """Returns the next token of each of these samplers, and lets it accept it.

    Args:
        samplers: by row.
        likeliest_ids: each row's token of the largest logit.
        logits: `[rows, vocab_size]`, which stay as they are.
        late_logits: makes those of some rows, `[n, vocab_size]`, if there are none yet.
        draw: what draws faster than numpy, if anything does.
    """
    chosen: dict[int, int] = {}
    others: dict[int, Sampler] = {}
    for row, sampler in samplers.items():
        if sampler.takes(likeliest_ids[row]):
            sampler.accept(likeliest_ids[row])
            chosen[row] = likeliest_ids[row]
        else:
            others[row] = sampler
    if logits is not None:
        return chosen | _choose_others(others, logits, draw)
    if others:
        assert late_logits is not None
        own = _choose_others(dict(enumerate(others.values())), late_logits(list(others)), draw)
        chosen |= {row: own[place] for place, row in enumerate(others)}
    return chosen


def _choose_others(samplers: Mapping[int, Sampler], logits: Tensor, draw: DrawTokens | None) -> dict[int, int]:
    """Does `choose_tokens` for samplers that need the logits, by row of these."""
    if draw is None:
        return {row: samplers[row].choose(scores) for row, scores in scores_of(logits, samplers).items()}
    chosen: dict[int, int] = {}
    drawn = {row: sampler.draw() for row, sampler in samplers.items() if sampler.is_plain_draw}
    adjusted = {row: sampler for row, sampler in samplers.items() if row not in drawn}
    if drawn:
        chosen |= zip(drawn, draw(logits, drawn), strict=True)
    if adjusted:
        chosen |= zip(adjusted, _choose_adjusted(list(adjusted.values()), logits[list(adjusted)], draw), strict=True)
    return chosen


def _choose_adjusted(samplers: Sequence[Sampler], logits: Tensor, draw: DrawTokens) -> list[int]:
    """Does `choose_tokens` for samplers that change their logits, which are copies on the host."""
    for own, sampler in zip(logits, samplers, strict=True):
        sampler.process(own)
    draws = {row: sampler.draw() for row, sampler in enumerate(samplers) if not sampler.is_greedy}
    chosen = dict(zip(draws, draw(logits, draws) if draws else (), strict=True))
    for row, sampler in enumerate(samplers):
        if row in chosen:
            sampler.accept(chosen[row])
        else:
            chosen[row] = sampler.choose(HostScores(logits[row].numpy()))
    return [chosen[row] for row in range(len(samplers))]


def token_logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Returns the log probabilities of one token and of the `num_top` best, from raw `[vocab_size]` logits."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(num_top)
    return TokenLogprobs(float(logprobs[token_id]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _first_above(ends: Numbers, aim: float) -> int:
    """Returns the first place whose sum so far is above `aim`, which rounding may put at the end."""
    place = int(ends.searchsorted(aim, side="right"))
    return place if place < len(ends) else int(ends.searchsorted(ends[-1]))
