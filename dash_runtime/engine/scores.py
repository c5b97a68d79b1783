"""Scores from which a sampler chooses a token: a row's logits, on the host as far as it asks for them.

Numpy's functions of a whole vocabulary take a tenth of torch's time or less. Knows logits; knows no sampling
parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
from torch import Tensor

from dash_runtime.devices import device_of

Numbers = numpy.ndarray
"""Float32, or int64 for token ids, on the host."""

_LIKELY = 10.0
"""Tokens whose scores are less below the best one's come first: they are a few hundred as a rule, and nearly all that
may be drawn."""


class Scores(Protocol):
    """One row's logits on the host, adjusted and divided by the temperature, as far as a sampler asks for them."""

    @property
    def vocab_size(self) -> int: ...

    def best(self) -> int:
        """Returns the token of the largest one, the first of equal ones."""

    def whole(self) -> Numbers:
        """Returns all, `[vocab_size]`."""

    def first(self) -> tuple[Numbers, Numbers]:
        """Returns some of the largest ones, as many as come easily, and their token ids, `[n]` each, best first."""

    def top(self, count: int) -> tuple[Numbers, Numbers]:
        """Returns the largest ones and their token ids, `[count]` each, best first."""

    def total(self) -> float:
        """Returns the logarithm of the sum of all exponentials."""


@dataclass(frozen=True, slots=True)
class HostScores:
    """`logits` is float32 `[vocab_size]` on the host."""

    logits: Numbers

    @property
    def vocab_size(self) -> int:
        return len(self.logits)

    def best(self) -> int:
        return int(self.logits.argmax())

    def whole(self) -> Numbers:
        return self.logits

    def first(self) -> tuple[Numbers, Numbers]:
        return self._above(self.logits.max() - _LIKELY)

    def top(self, count: int) -> tuple[Numbers, Numbers]:
        values, ids = self._above(numpy.partition(self.logits, -count)[-count])
        return values[:count], ids[:count]

    def total(self) -> float:
        most = self.logits.max()
        return float(most + numpy.log(numpy.exp(self.logits - most).sum()))

    def _above(self, bound: float) -> tuple[Numbers, Numbers]:
        ids = numpy.flatnonzero(self.logits >= bound)
        values = self.logits[ids]
        order = numpy.argsort(-values, kind="stable")
        return values[order], ids[order]


@dataclass(frozen=True, slots=True)
class DeviceScores:
    """Scores on a device, of which the host has the likeliest; it asks for more if it needs them."""

    logits: Tensor
    best_id: int
    values: Tensor
    ids: Tensor
    log_total: Tensor

    @property
    def vocab_size(self) -> int:
        return len(self.logits)

    def best(self) -> int:
        return self.best_id

    def whole(self) -> Numbers:
        return self.logits.cpu().numpy()

    def first(self) -> tuple[Numbers, Numbers]:
        return self.values.numpy(), self.ids.numpy()

    def top(self, count: int) -> tuple[Numbers, Numbers]:
        values, ids = self.logits.topk(count)
        return values.cpu().numpy(), ids.cpu().numpy()

    def total(self) -> float:
        return float(self.log_total)


def device_scores(logits: Tensor, num_candidates: int) -> Sequence[DeviceScores]:
    """Returns the scores of rows `[rows, vocab_size]` on a device; so many of the likeliest tokens come along."""
    device = device_of(logits.device)
    values, ids = logits.topk(min(num_candidates, logits.shape[1]))
    parts = [device.download(part) for part in (logits.argmax(dim=-1), values, ids, logits.logsumexp(dim=-1))]
    device.wait_for_downloads()
    best = parts[0].tolist()
    return [DeviceScores(*row) for row in zip(logits, best, *parts[1:], strict=True)]
