"""Logits processors: made only where needed, and a token mask is just one more."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dash_runtime.config import SamplingParameters
from dash_runtime.engine.logits_processors import LogitBias, OccurrencePenalty, RepetitionPenalty, make_processors
from dash_runtime.engine.sampling import Sampler
from dash_runtime.engine.speculative import Speculation
from dash_runtime.engine.text_drafts import TextDrafts
from dash_runtime.policy.draft_length import DraftLength

VOCAB_SIZE = 12
DRAFT_LENGTH = 3


class Ascending:
    """A token mask with a state: each token is one to three above the last, cyclically. The first one is free."""

    mostly_leaves_first = False

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> set[int]:
        if not self.accepted:
            return set(range(VOCAB_SIZE))
        return {(self.accepted[-1] + step) % VOCAB_SIZE for step in (1, 2, 3)}

    def process(self, logits: Tensor) -> None:
        logits[sorted(set(range(VOCAB_SIZE)) - self.allowed())] = -torch.inf

    def leaves_first(self, token_id: int) -> bool:
        return token_id in self.allowed()

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed()
        self.accepted.append(token_id)

    def rollback(self, token_ids: Sequence[int]) -> None:
        kept = len(self.accepted) - len(token_ids)
        assert self.accepted[kept:] == list(token_ids)
        del self.accepted[kept:]


def some_logits(place: int, path: int = 0) -> Tensor:
    return 2 * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(100 * path + place))


def ascends(token_ids: Sequence[int]) -> bool:
    steps = {(after - before) % VOCAB_SIZE for before, after in pairwise(token_ids)}
    return steps <= {1, 2, 3}


@pytest.mark.parametrize(
    ("parameters", "kinds"),
    [
        (SamplingParameters(), []),
        (SamplingParameters(temperature=0.7, top_p=0.9), []),
        (SamplingParameters(logit_bias={1: 2.0}), [LogitBias]),
        (SamplingParameters(presence_penalty=0.5), [OccurrencePenalty]),
        (SamplingParameters(frequency_penalty=0.5), [OccurrencePenalty]),
        (
            SamplingParameters(logit_bias={1: 2.0}, repetition_penalty=1.2, frequency_penalty=0.1),
            [LogitBias, RepetitionPenalty, OccurrencePenalty],
        ),
    ],
)
def test_a_request_has_the_processors_that_it_needs(parameters: SamplingParameters, kinds: list[type]) -> None:
    assert [type(processor) for processor in make_processors(parameters, [1])] == kinds
    assert Sampler(parameters, [1]).is_plain_greedy == (parameters == SamplingParameters())


def test_adjustments_apply_in_order_bias_then_repetition_then_occurrence() -> None:
    parameters = SamplingParameters(
        logit_bias={0: 1.0}, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5
    )
    adjusted = torch.tensor([1.0, 3.0, -1.0])
    for processor in make_processors(parameters, [2]):
        for token_id in (0, 0):
            processor.accept(token_id)
        processor.process(adjusted)
    assert adjusted.tolist() == [(1 + 1) / 2 - 0.25 - 2 * 0.5, 3.0, -2.0]


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(),
        SamplingParameters(presence_penalty=3.0),
        SamplingParameters(temperature=1.5),
        SamplingParameters(temperature=1.0, top_k=8, min_p=0.05, repetition_penalty=1.3),
    ],
)
def test_a_token_mask_is_one_more_processor(parameters: SamplingParameters) -> None:
    mask = Ascending()
    sampler = Sampler(parameters, [1], [mask])
    assert not sampler.is_plain_greedy
    token_ids = []
    for place in range(200):
        logits = some_logits(place)
        before = logits.clone()
        if not sampler.is_greedy:
            assert set(sampler.distribution(logits).nonzero().flatten().tolist()) <= mask.allowed()
        token_ids.append(sampler.sample(logits))
        assert torch.equal(logits, before)
    assert mask.accepted == token_ids
    assert ascends(token_ids)


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(),
        SamplingParameters(logit_bias={3: -1.0, 5: -0.5}),
        SamplingParameters(logit_bias={3: 0.5, 5: -0.5}),
        SamplingParameters(repetition_penalty=1.5),
        SamplingParameters(repetition_penalty=0.5),
        SamplingParameters(presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParameters(presence_penalty=-1.0, frequency_penalty=0.5),
        SamplingParameters(presence_penalty=1.0, frequency_penalty=-0.5),
    ],
    ids=str,
)
def test_a_token_that_is_taken_without_looking_at_the_others_is_the_one_that_looking_would_take(
    parameters: SamplingParameters,
) -> None:
    sampler = Sampler(parameters, [1, 2], [Ascending()])
    num_taken = num_others = 0
    for place in range(300):
        logits = some_logits(place).round()  # many are equal
        likeliest_id = int(logits.argmax())
        if sampler.takes(likeliest_id):
            num_taken += 1
            assert sampler.best(logits) == likeliest_id
        elif sampler.best(logits) != likeliest_id:
            num_others += 1
        sampler.sample(logits)
    raises_some = parameters not in (
        SamplingParameters(),
        SamplingParameters(logit_bias={3: -1.0, 5: -0.5}),
        SamplingParameters(repetition_penalty=1.5),
        SamplingParameters(presence_penalty=1.0, frequency_penalty=0.5),
    )
    assert (num_taken == 0) == raises_some
    assert num_others > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("likeness", [0.0, 0.8, 1.0])
def test_a_token_mask_is_rolled_back_with_rejected_drafts(temperature: float, likeness: float) -> None:
    mask = Ascending()
    parameters = SamplingParameters(temperature=temperature, seed=3)
    speculation = Speculation(
        Sampler(parameters, [], [mask]), DraftLength(0.1, {DRAFT_LENGTH: 0.1}), TextDrafts([], 200)
    )
    output: list[int] = []
    while len(output) < 100:
        speculation.begin(1000)
        places = range(len(output), len(output) + DRAFT_LENGTH + 1)
        full = torch.stack([some_logits(place) for place in places])
        drafting = [likeness * some_logits(place) + (1 - likeness) * some_logits(place, path=1) for place in places]
        while speculation.is_drafting:
            speculation.draft(drafting[len(speculation.token_ids)], 0.1)
        output += speculation.verify(full)
        assert mask.accepted == output
    assert ascends(output)
    counts = speculation.statistics()
    if likeness == 1:
        assert counts.num_accepted == counts.num_drafted
    else:
        assert counts.num_accepted < counts.num_drafted
    if temperature == 0:
        direct = Sampler(parameters, [], [Ascending()])
        assert output == [direct.sample(some_logits(place)) for place in range(len(output))]
