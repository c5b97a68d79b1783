"""A prompt's numbers are the same, bit for bit, wherever its passes begin. The prefix cache relies on this."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.linears.dense_linear import (
    MAX_INVARIANT_ROWS,
    BatchInvariantLinear,
    FullLinear,
    Linear,
    WidenedLinear,
    first_parts,
    make_full_linear,
)
from dash_runtime.linears.quantization import make_linear
from tests.marks import long
from tests.runtime.support import full_plan, load_decoder, new_cache
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = pytest.mark.alone

MATRICES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (1000, 96)]
"""`(out_features, in_features)` of the embedded model's matrices, and one that fits no tile."""
SERVED_MATRICES = [
    *((960, 576), (384, 576), (576, 576), (3072, 576), (576, 1536)),
    *((1152, 896), (256, 896), (896, 896), (9728, 896), (896, 4864)),
    *long([(2048, 1536), (512, 1536), (1536, 1536), (17920, 1536), (1536, 8960)]),
]
"""The matrices of the embedded model, of Qwen2.5 0.5B and of Qwen2.5 1.5B."""
BIASED_MATRICES = [(1152, 896), (256, 896), (2048, 1536), (512, 1536)]
"""Those of them that have a bias."""
SERVED_HEADS = [(49152, 576), *long([(151936, 896), (151936, 1536)])]
PRODUCTS = (make_full_linear, partial(BatchInvariantLinear, WidenedLinear))
_TOGETHER = 64


@torch.inference_mode()
def prefilled(decoder: Decoder, prompt: Sequence[int], passes: Sequence[int]) -> list[Tensor]:
    """Returns the keys and values of all layers, and the last token's logits."""
    cache = new_cache(decoder, len(prompt))
    start = 0
    for length in passes:
        chunk = prompt[start : start + length]
        batch = decoder.batch(PassKind.PREFILL, [cache], [len(chunk)], [Identity()])
        hidden = decoder.embed(chunk)
        for layer, action in enumerate(full_plan(decoder)):
            hidden = decoder.run_layer(layer, (action,) * len(chunk), hidden, batch)
        batch.commit()
        start += length
    assert start == cache.length == len(prompt)
    return [*cache.copy_of(0, start), decoder.logits(hidden[-1:], (Action.FULL,))]


def passes_from(decoder: Decoder, num_tokens: int, starts: Sequence[int]) -> list[int]:
    """Returns the lengths of passes that begin at `starts`, each as long as it may be."""
    lengths = [end - start for start, end in zip((0, *starts), (*starts, num_tokens), strict=True)]
    most = decoder.max_prompt_rows
    return [min(most, length - first) for length in lengths for first in range(0, length, most)]


def assert_cuts_make_no_difference(decoder: Decoder, chance: random.Random, num_tokens: int) -> None:
    prompt = [chance.randrange(decoder.config.vocab_size) for _ in range(num_tokens)]
    places = range(decoder.row_block, num_tokens, decoder.row_block)
    some = sorted(chance.sample(places, chance.randint(0, len(places))))
    whole = prefilled(decoder, prompt, passes_from(decoder, num_tokens, []))
    for starts in (places, places[-1:], some):
        parts = prefilled(decoder, prompt, passes_from(decoder, num_tokens, starts))
        for own, expected in zip(parts, whole, strict=True):
            assert torch.equal(own, expected), (num_tokens, list(starts))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cuts_of_a_prompt_make_no_difference(family: str, tmp_path: Path) -> None:
    decoder = load_decoder(save_tiny_model(tmp_path / family, family), torch.bfloat16, (Action.FULL,))
    assert decoder.max_prompt_rows == MAX_INVARIANT_ROWS
    chance = random.Random(2)
    for num_tokens in (2, 65, 192, 257, 383):
        assert_cuts_make_no_difference(decoder, chance, num_tokens)


@pytest.mark.embedded
def test_the_cuts_of_a_prompt_make_no_difference_to_the_embedded_model(embedded_folder: Path) -> None:
    decoder = load_decoder(embedded_folder, torch.bfloat16, (Action.FULL,))
    chance = random.Random(4)
    for num_tokens in (65, 449):
        assert_cuts_make_no_difference(decoder, chance, num_tokens)


def test_a_row_of_a_full_product_is_bit_equal_among_any_number_of_others() -> None:
    """Every number up to a few blocks of rows, and then every fifth, which meets each place in a block."""
    counts = [*range(1, 70), *range(70, MAX_INVARIANT_ROWS, 5)]
    for shape in MATRICES:
        for make_product in PRODUCTS:
            assert_rows_are_invariant(make_product, shape, has_bias=True, counts=counts)


@pytest.mark.parametrize("shape", SERVED_MATRICES, ids=str)
def test_a_row_of_a_served_models_product_is_bit_equal_among_any_number_of_others(shape: tuple[int, int]) -> None:
    for make_product in PRODUCTS:
        assert_rows_are_invariant(make_product, shape, has_bias=shape in BIASED_MATRICES, counts=range(1, 18))


@pytest.mark.parametrize("shape", SERVED_HEADS, ids=str)
def test_a_row_of_a_served_models_head_is_bit_equal_among_any_number_of_others(shape: tuple[int, int]) -> None:
    """Tests only the numbers of rows that decoding has, since a prompt never has all its rows in the head. No family's
    head has a bias."""
    assert_rows_are_invariant(make_full_linear, shape, has_bias=False, counts=range(1, 18))


@pytest.mark.parametrize("action", [Action.INT3, Action.INT4, Action.INT8])
@pytest.mark.parametrize("shape", SERVED_MATRICES, ids=str)
def test_a_row_of_a_quantised_product_is_bit_equal_among_any_number_of_others(
    shape: tuple[int, int], action: Action
) -> None:
    assert_rows_are_invariant(partial(make_linear, action), shape, has_bias=True, counts=range(1, 18))


def assert_rows_are_invariant(
    make_product: Callable[[FullLinear], Linear], shape: tuple[int, int], has_bias: bool, counts: Sequence[int]
) -> None:
    """Tries sums whose terms cancel, where another order nearly always shows, and usual sums."""
    product = make_product(FullLinear(cancelling_weight(shape), torch.zeros(shape[0]).bfloat16() if has_bias else None))
    num_together = -(-2 * max(counts) // _TOGETHER)
    for inputs in (cancelling_inputs(shape[1]), some_inputs(shape[1])):
        expected = torch.cat([product(rows) for rows in inputs.split(_TOGETHER)[:num_together]])
        for count in counts:
            own = torch.cat([product(rows) for rows in inputs[: 2 * count].split(count)])
            assert torch.equal(own, expected[: len(own)]), (count, shape)


def cancelling_weight(shape: tuple[int, int]) -> Tensor:
    """Returns `[out_features, in_features]` in which the later half of each row mirrors the earlier half."""
    half = torch.randn(64, shape[1] // 2, generator=torch.Generator().manual_seed(1))
    return torch.cat((half, half.flip(1)), dim=1).bfloat16().repeat(-(-shape[0] // 64), 1)[: shape[0]]


def cancelling_inputs(in_features: int) -> Tensor:
    """Returns rows whose later half subtracts what the earlier half adds to a sum with `cancelling_weight`."""
    half = torch.randn(MAX_INVARIANT_ROWS, in_features // 2, generator=torch.Generator().manual_seed(2))
    return torch.cat((half, -half.flip(1)), dim=1).bfloat16()


def some_inputs(in_features: int) -> Tensor:
    return torch.randn(MAX_INVARIANT_ROWS, in_features, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.mark.parametrize("agreeing", [set(), {1, 64}, {2, 64, 128}, {16, 64}, {4, 64, 112}])
def test_rows_are_given_to_a_product_only_in_numbers_that_agree(agreeing: set[int]) -> None:
    given: list[int] = []

    def make_product(full: FullLinear) -> Linear:
        def product(inputs: Tensor) -> Tensor:
            given.append(len(inputs))
            wrong = 0 if len(inputs) in agreeing else len(inputs) + torch.arange(len(inputs)).unsqueeze(1)
            return full(inputs) + wrong

        return product

    full = FullLinear(some_inputs(32)[:16])
    linear = BatchInvariantLinear(make_product, full)
    inputs = torch.arange(256 * 32).view(256, 32).remainder(7).bfloat16()
    given.clear()
    for num_rows in (1, 2, 3, 7, 16, 63, 64, 65, 100, 127, 128, 129, 192, 200, 256):
        outputs = linear(inputs[:num_rows])
        torch.testing.assert_close(outputs, full(inputs[:num_rows]) + (0 if agreeing else 1))
    assert set(given) <= (agreeing or {1})


def test_rows_are_cut_into_the_cheapest_calls_that_there_are() -> None:
    assert list(first_parts(range(1, 257))) == list(range(257))
    parts = first_parts([2, 16, 64])
    assert [parts[count] for count in (1, 2, 3, 16, 17, 60, 80)] == [2, 2, 16, 16, 2, 64, 16]


def test_the_activation_rounds_the_same_wherever_a_number_stands() -> None:
    """The ends of a thread's share may run through other code than the rest, and lie where the number of rows puts
    them."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    alone = torch.cat([functional.silu(number) for number in numbers.split(1)])
    assert torch.equal(functional.silu(numbers), alone)
