"""Scores from which a sampler chooses a token: a row's logits, on the host as far as it asks for them.

Knows logits; knows no sampling parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dash_runtime.devices import device_of


def likeliest(logits: Tensor) -> Any:
    """Returns the token of the largest logit, the first of equal ones: a number for `[vocab_size]`, a list for `[rows,
    vocab_size]`. On a CPU numpy takes a third of torch's time, or less."""
    return device_of(logits.device).likeliest(logits)


class Scores(Protocol):
    """One row's logits on the host, adjusted and divided by the temperature, as far as a sampler asks for them."""

    @property
    def vocab_size(self) -> int: ...

    def best(self) -> int:
        """Returns the token of the largest one, the first of equal ones."""

    def whole(self) -> Tensor:
        """Returns all, `[vocab_size]`."""

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns the largest ones and their token ids, `[count]` each, best first."""

    def total(self) -> Tensor:
        """Returns the logarithm of the sum of all exponentials."""


@dataclass(frozen=True, slots=True)
class HostScores:
    """`logits` is float32 `[vocab_size]` on the host."""

    logits: Tensor

    @property
    def vocab_size(self) -> int:
        return len(self.logits)

    def best(self) -> int:
        return int(likeliest(self.logits))

    def whole(self) -> Tensor:
        return self.logits

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        return self.logits.topk(count)

    def total(self) -> Tensor:
        return self.logits.logsumexp(0)


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

    def whole(self) -> Tensor:
        return self.logits.cpu()

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        if count > len(self.ids):
            values, ids = self.logits.topk(count)
            return values.cpu(), ids.cpu()
        return self.values[:count], self.ids[:count]

    def total(self) -> Tensor:
        return self.log_total


def device_scores(logits: Tensor, num_candidates: int) -> Sequence[DeviceScores]:
    """Returns the scores of rows `[rows, vocab_size]` on a device; so many of the likeliest tokens come along."""
    device = device_of(logits.device)
    values, ids = logits.topk(min(num_candidates, logits.shape[1]))
    parts = [device.download(part) for part in (logits.argmax(dim=-1), values, ids, logits.logsumexp(dim=-1))]
    device.wait_for_downloads()
    best = parts[0].tolist()
    return [DeviceScores(*row) for row in zip(logits, best, *parts[1:], strict=True)]
