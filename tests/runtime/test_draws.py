"""Native code draws the tokens that numpy draws by the same numbers, in every row and whatever is kept."""

from collections.abc import Sequence
from ctypes import c_int64

import numpy
import pytest
import torch
from torch import Tensor

from dash_runtime.config import SamplingParameters
from dash_runtime.engine.sampling import Sampler, choose_tokens
from dash_runtime.native.burst_record import draw_structs
from dash_runtime.passes import Draw
from tests.runtime.native_code import native_library

pytestmark = pytest.mark.usefixtures("each_level")

KEPT = {
    "all": SamplingParameters(temperature=0.8),
    "all, nearly flat": SamplingParameters(temperature=30.0),
    "top_p": SamplingParameters(temperature=0.7, top_p=0.9),
    "a small top_p": SamplingParameters(temperature=0.7, top_p=1e-6),
    "top_p of many": SamplingParameters(temperature=8.0, top_p=0.97),
    "min_p": SamplingParameters(temperature=1.0, min_p=0.02),
    "a min_p below all that is looked at first": SamplingParameters(temperature=0.2, min_p=1e-9),
    "top_k": SamplingParameters(temperature=0.7, top_k=20),
    "a top_k beyond what is looked at first": SamplingParameters(temperature=0.1, top_k=400),
    "a top_k of more than there are": SamplingParameters(temperature=1.0, top_k=5000),
    "top_k and top_p": SamplingParameters(temperature=1.0, top_k=300, top_p=0.8),
    "everything": SamplingParameters(temperature=1.5, top_k=200, top_p=0.95, min_p=0.01),
}


class ByNumber(Sampler):
    """Draws by a number that is given."""

    number = 0.0

    def _number(self) -> float:
        return self.number


def drawn(logits: Tensor, draws: dict[int, Draw], num_threads: int = 1) -> list[int]:
    tokens = (c_int64 * len(draws))()
    rows = (c_int64 * len(draws))(*draws)
    arguments = logits.shape[1], rows, draw_structs(draws.values()), len(draws), num_threads, tokens
    native_library().draw(logits.data_ptr(), *arguments)
    return tokens[:]


def some_logits(num_rows: int, vocab_size: int) -> Tensor:
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(4))
    logits[:, 5] = logits[:, 30]  # equal ones
    logits[0, 12:15] = -torch.inf
    return logits


@pytest.mark.parametrize("vocab_size", [1008, 1003, 40])
@pytest.mark.parametrize("kept", KEPT)
def test_the_same_number_draws_the_token_that_numpy_draws(kept: str, vocab_size: int) -> None:
    logits = some_logits(1, vocab_size)
    sampler = ByNumber(KEPT[kept], [])
    numbers = [1e-9, 0.5, 0.999, *numpy.random.default_rng(7).random(400).tolist()]
    for number in numbers:
        sampler.number = number
        assert drawn(logits, {0: sampler.draw()}) == [sampler.sample(logits[0])]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_each_row_has_its_own_draw(num_threads: int) -> None:
    logits = some_logits(9, 320)
    samplers = {row: ByNumber(parameters, []) for row, parameters in enumerate(list(KEPT.values())[:9]) if row % 3}
    for row, sampler in samplers.items():
        sampler.number = (row + 1) / 11
    together = drawn(logits, {row: sampler.draw() for row, sampler in samplers.items()}, num_threads)
    assert together == [sampler.sample(logits[row]) for row, sampler in samplers.items()]


@pytest.mark.parametrize("kept", KEPT)
def test_the_largest_number_draws_a_token_that_may_be_drawn(kept: str) -> None:
    logits = some_logits(1, 1008)
    sampler = ByNumber(KEPT[kept], [])
    sampler.number = 1 - 2**-53
    may_be_drawn = sampler.distribution(logits[0]) > 0
    for token_id in (*drawn(logits, {0: sampler.draw()}), sampler.sample(logits[0])):
        assert may_be_drawn[token_id]


def test_logits_that_are_no_numbers_draw_some_token() -> None:
    logits = torch.full((1, 320), torch.nan)
    for parameters in KEPT.values():
        (token_id,) = drawn(logits, {0: ByNumber(parameters, []).draw()})
        assert 0 <= token_id < 320


def test_a_step_takes_each_row_by_its_own_rule_with_what_draws_faster_and_without_and_with_late_logits() -> None:
    logits = some_logits(5, 320)
    likeliest_ids = logits.argmax(dim=-1).tolist()

    def samplers() -> dict[int, Sampler]:
        return {
            0: Sampler(SamplingParameters(), []),
            1: Sampler(KEPT["top_p"], []),
            2: Sampler(SamplingParameters(presence_penalty=1.0), []),
            4: Sampler(SamplingParameters(temperature=0.7, repetition_penalty=1.3), [likeliest_ids[4]]),
        }

    expected: dict[int, list[int]] = {row: [] for row in samplers()}
    for row, sampler in samplers().items():
        expected[row] = [sampler.sample(logits[row]) for _ in range(20)]
    made: list[list[int]] = []

    def some_of(rows: Sequence[int]) -> Tensor:
        made.append(list(rows))
        return logits[rows]

    for draw in (None, lambda logits, draws: drawn(logits, dict(draws))):
        for own_logits in (logits, None):
            own = samplers()
            chosen = [choose_tokens(own, likeliest_ids, own_logits, some_of, draw) for _ in range(20)]
            assert {row: [step[row] for step in chosen] for row in own} == expected
    assert all(0 not in rows for rows in made)  # the likeliest is enough
    assert len(made) == 40
