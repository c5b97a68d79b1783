"""Speculative sampling on a real model's logits: the distribution is full depth's, and a mistake would be noticed."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.config import SamplingParameters
from dash_runtime.engine.sampling import Sampler
from dash_runtime.engine.speculative import DraftSource, Proposal, Speculation
from dash_runtime.engine.text_drafts import TextDrafts
from dash_runtime.policy.draft_length import DraftLength, NextDraft
from tests.runtime.support import full_plan, load_decoder, new_cache, run_rows

PROMPT = (3, 5, 3, 9)
LIKELY, UNLIKELY = 0, 3
"""Places of proposed tokens, in the order of full depth's preference."""
NUM_SAMPLES = 2_000
DRAFT_LENGTH = 2
Logits = Callable[[tuple[int, ...]], Tensor]


class NoText:
    """A source that proposes nothing."""

    def append(self, token_id: int) -> None:
        pass

    def propose(self, drafted: Sequence[int], count: int) -> Proposal:
        return Proposal([], 0)


class Preferred(NoText):
    """Proposes, with certainty, the tokens at one place of full depth's preferences: the first one or two.

    Args:
        match: 16 for whole drafts, 1 to go on with the model's.
    """

    def __init__(self, logits: Logits, place: int, match: int) -> None:
        self._logits = logits
        self._place = place
        self._match = match
        self.output: tuple[int, ...] = ()

    def propose(self, drafted: Sequence[int], count: int) -> Proposal:
        token_ids: list[int] = []
        for _ in range(count):
            logits = self._logits((*PROMPT, *self.output, *drafted, *token_ids))
            token_ids.append(int(logits.argsort(descending=True)[self._place]))
        return Proposal(token_ids, self._match)


class TrustsText(DraftLength):
    """Drafts as long as it may: by the text once that proposes a token, with a short match after one by the model."""

    def next(
        self, num_tokens_left: int, matches: Sequence[int] = (), match: int = 0, passes: int | None = None
    ) -> NextDraft:
        return NextDraft(self.longest, match > 1 or (match == 1 and len(matches) == 1))


class Careless(Speculation):
    """Replaces a rejected token by any that full depth likes: wrong, since tokens proposed too often come again."""

    @staticmethod
    def _left_over(wanted: Tensor, proposed: Tensor) -> Tensor:
        return wanted


@pytest.fixture(scope="module")
def paths(tiny_folder: Path) -> tuple[Logits, Logits]:
    """Returns the logits after some tokens, as a function: full depth's, and those of a path that skips two layers."""
    decoder = load_decoder(tiny_folder, torch.float32, (Action.SKIP, Action.FULL))
    skipping = list(full_plan(decoder))
    skipping[2] = skipping[4] = Action.SKIP

    def logits(plan: tuple[Action, ...], token_ids: tuple[int, ...]) -> Tensor:
        return run_rows(decoder, [new_cache(decoder)], [token_ids], [plan])[-1]

    return (
        lru_cache(None)(lambda token_ids: logits(full_plan(decoder), token_ids)),
        lru_cache(None)(lambda token_ids: logits(tuple(skipping), token_ids)),
    )


def chi_square(
    kind: type[Speculation], parameters: SamplingParameters, paths: tuple[Logits, Logits], text: Preferred | None = None
) -> float:
    """Returns chi-square of the first two tokens of many sequences against direct sampling, divided by the 99.99 %
    quantile for its degrees of freedom."""
    full, drafting = paths
    sampler = Sampler(parameters, PROMPT)
    counts: Counter[tuple[int, ...]] = Counter()
    num_from_text = 0
    for _ in range(NUM_SAMPLES):
        speculation = kind(sampler, TrustsText(0.1, {DRAFT_LENGTH: 0.1}), text or NoText())
        output: tuple[int, ...] = ()
        while len(output) < 2:
            if text is not None:
                text.output = output
            speculation.begin(100)
            while speculation.is_drafting:
                speculation.draft(drafting((*PROMPT, *output, *speculation.token_ids)), 0.1)
                speculation.go_on()
            drafted = tuple(speculation.token_ids)
            num_from_text += speculation.num_drafted_from_text
            rows = [full(PROMPT + output + drafted[:place]) for place in range(DRAFT_LENGTH + 1)]
            output += tuple(speculation.verify(torch.stack(rows)))
        sampler.rollback(output)
        counts[output[:2]] += 1
    assert bool(num_from_text) is (text is not None)
    expected = direct_distribution(parameters, full)
    assert set(counts) <= set(expected)
    statistic = sum((counts[pair] - NUM_SAMPLES * p) ** 2 / (NUM_SAMPLES * p) for pair, p in expected.items())
    freedom = len(expected) - 1
    # Wilson and Hilferty 1931; 3.72 is the normal distribution's quantile.
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic / quantile


def direct_distribution(parameters: SamplingParameters, full: Logits) -> dict[tuple[int, ...], float]:
    sampler = Sampler(parameters, PROMPT)
    first = sampler.distribution(full(PROMPT))
    expected: dict[tuple[int, ...], float] = {}
    for token_id in first.nonzero().flatten().tolist():
        sampler.accept(token_id)
        second = sampler.distribution(full((*PROMPT, token_id)))
        sampler.rollback([token_id])
        for other in second.nonzero().flatten().tolist():
            expected[token_id, other] = float(first[token_id] * second[other])
    return expected


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1.0, top_k=4, seed=1),
        SamplingParameters(temperature=1.3, top_k=5, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.5, seed=2),
    ],
)
def test_the_distribution_is_full_depths(parameters: SamplingParameters, paths: tuple[Logits, Logits]) -> None:
    assert chi_square(Speculation, parameters, paths) < 1


@pytest.mark.parametrize("place", [LIKELY, UNLIKELY])
@pytest.mark.parametrize("match", [16, 1])
def test_the_distribution_is_full_depths_where_the_text_drafts_or_goes_on_for_the_model(
    place: int, match: int, paths: tuple[Logits, Logits]
) -> None:
    parameters = SamplingParameters(temperature=1.0, top_k=4, seed=3)
    assert chi_square(Speculation, parameters, paths, Preferred(paths[0], place, match)) < 1


@pytest.mark.parametrize("drafts_from_text", [False, True])
def test_a_wrong_replacement_of_rejected_tokens_would_be_noticed(
    drafts_from_text: bool, paths: tuple[Logits, Logits]
) -> None:
    text = Preferred(paths[0], LIKELY, 16) if drafts_from_text else None
    assert chi_square(Careless, SamplingParameters(temperature=1.0, top_k=4, seed=1), paths, text) > 1.5


def test_a_draft_that_full_depth_agrees_with_is_taken_whole_and_one_token_more() -> None:
    speculation = Speculation(Sampler(SamplingParameters(), []), DraftLength(0.1, {2: 0.1}), NoText())
    logits = torch.eye(5)[[4, 1, 3]]
    speculation.begin(10)
    assert [speculation.draft(logits[place], 0.1) for place in range(2)] == [4, 1]
    assert speculation.verify(logits) == [4, 1, 3]
    counts = speculation.statistics()
    assert (counts.num_drafted, counts.num_accepted, counts.num_verifications) == (2, 2, 1)


@pytest.mark.parametrize("place", [0, 1])
def test_the_first_token_that_full_depth_would_not_have_chosen_ends_a_greedy_draft(place: int) -> None:
    speculation = Speculation(Sampler(SamplingParameters(), []), DraftLength(0.1, {2: 0.1}), NoText())
    wanted = torch.eye(5)[[4, 1, 3]]
    speculation.begin(10)
    for row in range(2):
        speculation.draft(torch.eye(5)[0] if row == place else wanted[row], 0.1)
    assert speculation.verify(wanted) == [4, 1, 3][: place + 1]
    assert speculation.statistics().num_accepted == place


def test_penalties_see_the_draft_and_forget_what_was_rejected() -> None:
    sampler = Sampler(SamplingParameters(presence_penalty=5.0), [])
    speculation = Speculation(sampler, DraftLength(0.1, {2: 0.1}), NoText())
    logits = torch.tensor([3.0, 2.0, 1.0])
    speculation.begin(10)
    assert [speculation.draft(logits, 0.1) for _ in range(2)] == [0, 1]  # the second is penalised for the first
    other = torch.tensor([0.0, 0.0, 3.0])
    assert speculation.verify(torch.stack((other, logits, logits))) == [2]
    assert [sampler.best(logits), sampler.best(other)] == [0, 0]  # token 2 is penalised, tokens 0 and 1 are not


def test_every_pair_of_tokens_can_be_drawn(paths: tuple[Logits, Logits]) -> None:
    expected = direct_distribution(SamplingParameters(temperature=1.0, top_k=4), paths[0])
    firsts = {first for first, _ in expected}
    assert len(firsts) == 4
    assert len(expected) == len(list(product(firsts, range(4))))


def test_a_draft_from_the_text_is_complete_at_once_and_counted_apart() -> None:
    source: DraftSource = TextDrafts([1, 2, 3, 4, 1, 2], 10)
    speculation = Speculation(Sampler(SamplingParameters(), []), DraftLength(0.9, {3: 0.1}), source)
    speculation.begin(10)
    assert not speculation.is_drafting
    assert speculation.token_ids == [3, 4, 1]
    assert speculation.verify(torch.eye(5)[[3, 4, 2, 0]]) == [3, 4, 2]
    counts = speculation.statistics()
    assert (counts.num_drafted, counts.num_drafted_from_text, counts.num_accepted_from_text) == (3, 3, 2)
    assert (counts.num_accepted, counts.num_verifications, counts.accepted_lengths) == (2, 1, [0, 0, 1])
