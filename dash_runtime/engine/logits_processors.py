"""Adjustments of the logits before a token is chosen: one small class each.

Knows the tokens of one sequence; knows no temperature, no draws and no batch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dash_runtime.config import SamplingParameters
from dash_runtime.devices import device_of


class LogitsProcessor(Protocol):
    """Adjusts one sequence's logits by the tokens that it has so far."""

    @property
    def mostly_leaves_first(self) -> bool:
        """True if the likeliest token seldom changes by it."""
        ...

    def process(self, logits: Tensor) -> None:
        """Adjusts float32 `[vocab_size]` logits in place, on their device."""
        ...

    def leaves_first(self, token_id: int) -> bool:
        """True if `process` would leave this token's logit as it is and raise no other's, so that the likeliest token
        stays the likeliest. May be False where that takes long to say."""
        ...

    def accept(self, token_id: int) -> None:
        """Takes note of the sequence's next token, drafted ones included."""
        ...

    def rollback(self, token_ids: Sequence[int]) -> None:
        """Forgets the tokens that were accepted last; `token_ids` in the order in which they were."""
        ...


def make_processors(parameters: SamplingParameters, prompt_token_ids: Iterable[int]) -> list[LogitsProcessor]:
    """Returns the processors that these parameters need, in the order in which they apply."""
    p = parameters
    processors: list[LogitsProcessor] = []
    if p.logit_bias:
        processors.append(LogitBias(p.logit_bias))
    if p.repetition_penalty != 1:
        processors.append(RepetitionPenalty(p.repetition_penalty, prompt_token_ids))
    if p.presence_penalty or p.frequency_penalty:
        processors.append(OccurrencePenalty(p.presence_penalty, p.frequency_penalty))
    return processors


class LogitBias:
    """Adds a constant to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._own = frozenset(bias)
        self.mostly_leaves_first = max(bias.values()) <= 0
        self._ids = torch.tensor([*bias])
        self._values = torch.tensor([*bias.values()], dtype=torch.float32)

    def process(self, logits: Tensor) -> None:
        upload = device_of(logits.device).upload
        logits[upload(self._ids)] += upload(self._values)

    def leaves_first(self, token_id: int) -> bool:
        return self.mostly_leaves_first and token_id not in self._own

    def accept(self, token_id: int) -> None:
        pass

    def rollback(self, token_ids: Sequence[int]) -> None:
        pass


class _OutputCounts:
    """Counts each output token."""

    mostly_leaves_first = False

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def accept(self, token_id: int) -> None:
        self._counts[token_id] += 1

    def rollback(self, token_ids: Sequence[int]) -> None:
        self._counts -= Counter(token_ids)


class RepetitionPenalty(_OutputCounts):
    """Makes each token of the prompt and the output less likely, whatever its logit's sign (Keskar et al. 2019)."""

    def __init__(self, penalty: float, prompt_token_ids: Iterable[int]) -> None:
        super().__init__()
        self._penalty = penalty
        self._prompt_ids = frozenset(prompt_token_ids)

    def process(self, logits: Tensor) -> None:
        seen = torch.tensor([*(self._prompt_ids | self._counts.keys())], dtype=torch.long)
        seen = device_of(logits.device).upload(seen)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / self._penalty, values * self._penalty)

    def leaves_first(self, token_id: int) -> bool:
        return self._penalty >= 1 and token_id not in self._prompt_ids and token_id not in self._counts


class OccurrencePenalty(_OutputCounts):
    """Subtracts from each output token's logit: `presence` once, and `frequency` for every occurrence."""

    def __init__(self, presence: float, frequency: float) -> None:
        super().__init__()
        self._presence = presence
        self._frequency = frequency

    def process(self, logits: Tensor) -> None:
        if self._counts:
            upload = device_of(logits.device).upload
            counts = torch.tensor([*self._counts.values()], dtype=logits.dtype)
            logits[upload(torch.tensor([*self._counts]))] -= upload(self._presence + self._frequency * counts)

    def leaves_first(self, token_id: int) -> bool:
        return self._presence >= 0 and self._frequency >= 0 and token_id not in self._counts
