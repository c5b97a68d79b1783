"""Counts how often answers are right, and how many of them differ from full depth's, with bootstrap intervals.

Knows answers, question by question; knows no models.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from dash_runtime.errors import ConfigError

_RESAMPLES = 2000
_BATCH = 100
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one path to the same questions, in their order."""

    metric: str
    given: tuple[Hashable, ...]
    """The answers, in a form that is equal if they are the same."""
    is_right: tuple[bool, ...]
    num_decided: int
    """Tokens that a policy or plan could decide."""
    total_cost: float
    """Summed over these tokens."""
    log_likelihoods: tuple[float, ...] | None = None
    """Log-likelihoods of the right answers, in nats; None if they were not measured."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions, with its 95 % interval from a bootstrap over the questions."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One line of the table of tasks.

    `kind` is `full_depth`, `fixed` or `policy`; only a policy has a budget. `cost_share` is the mean cost of the
    decided tokens, as a share of the full-depth token, head included; 1 if there were none. The estimates from
    `changed` on compare with full depth on the same questions, and are None for full depth itself: the share of changed
    answers, of right ones that became wrong (`lost`), of wrong ones that became right (`gained`), and their difference.
    """

    name: str
    kind: str
    metric: str
    budget: float | None
    accuracy: Estimate
    log_likelihood: Estimate | None
    count: int
    cost_share: float
    changed: Estimate | None = None
    lost: Estimate | None = None
    gained: Estimate | None = None
    gain: Estimate | None = None

    def to_json(self) -> dict[str, object]:
        """Returns the line with each estimate as its mean, and its interval beside it."""
        row: dict[str, object] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                row |= {name: value["mean"], f"{name}_interval": [value["low"], value["high"]]}
            else:
                row[name] = value
        return row


def judge(answers: Answers, full_depth: Answers | None, *, name: str, kind: str, budget: float | None) -> Accuracy:
    """Returns the line of these answers, compared with full depth's unless that is None.

    Raises:
        ConfigError: there are no questions.
    """
    count = len(answers.is_right)
    if count == 0:
        raise ConfigError("tasks", "has no questions")
    likelihoods = answers.log_likelihoods
    row = Accuracy(
        name=name,
        kind=kind,
        metric=answers.metric,
        budget=budget,
        accuracy=estimate(answers.is_right),
        log_likelihood=None if likelihoods is None else estimate(likelihoods),
        count=count,
        cost_share=answers.total_cost / answers.num_decided if answers.num_decided else 1.0,
    )
    if full_depth is None:
        return row
    rights = list(zip(full_depth.is_right, answers.is_right, strict=True))
    return replace(
        row,
        changed=estimate([own != full for own, full in zip(answers.given, full_depth.given, strict=True)]),
        lost=estimate([before and not after for before, after in rights]),
        gained=estimate([after and not before for before, after in rights]),
        gain=estimate([after - before for before, after in rights]),
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean with its percentile bootstrap interval. The same values give the same interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = [
        sample[torch.randint(len(values), (_BATCH, len(values)), generator=generator)].mean(dim=1)
        for _ in range(_RESAMPLES // _BATCH)
    ]
    tail = (1 - _LEVEL) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(float(sample.mean()), low, high)
