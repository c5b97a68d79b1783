"""A prompt's numbers are the same, bit for bit, wherever its passes begin: what reusing a part of it rests on."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.decoder.compensation import Identity
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_linear import (
    MAX_ALIKE_ROWS,
    AlikeLinear,
    FullLinear,
    WidenedLinear,
    for_many_rows,
    make_full_linear,
)
from tests.runtime.support import full_plan, load_decoder, new_cache
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = pytest.mark.alone

MATRICES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (1000, 96)]
"""`(out_features, in_features)`: those of the embedded model, and one that fits no tile."""


@torch.inference_mode()
def prefilled(decoder: Decoder, prompt: Sequence[int], passes: Sequence[int]) -> list[Tensor]:
    """Keys and values of all layers, and the last token's logits."""
    cache = new_cache(decoder, len(prompt))
    start = 0
    for length in passes:
        chunk = prompt[start : start + length]
        batch = decoder.rows([cache], [len(chunk)], [Identity()], is_prompt=True)
        hidden = decoder.embed(chunk)
        for layer, action in enumerate(full_plan(decoder)):
            hidden = decoder.run_layer(layer, (action,) * len(chunk), hidden, batch)
        batch.commit()
        start += length
    assert start == cache.length == len(prompt)
    return [cache.copy_of(0, start), decoder.logits(hidden[-1:], (Action.FULL,))]


def passes_from(decoder: Decoder, num_tokens: int, starts: Sequence[int]) -> list[int]:
    """Lengths of the passes that begin at `starts`, and go on from there as long as they may."""
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
    assert decoder.max_prompt_rows == MAX_ALIKE_ROWS
    chance = random.Random(2)
    for num_tokens in (2, 65, 192, 257, 383):
        assert_cuts_make_no_difference(decoder, chance, num_tokens)


@pytest.mark.embedded
def test_the_cuts_of_a_prompt_make_no_difference_to_the_embedded_model(embedded_folder: Path) -> None:
    decoder = load_decoder(embedded_folder, torch.bfloat16, (Action.FULL,))
    chance = random.Random(4)
    for num_tokens in (65, 449):
        assert_cuts_make_no_difference(decoder, chance, num_tokens)


def test_a_prompts_last_row_alone_is_not_taken_for_a_decoded_one(tiny_folder: Path) -> None:
    """Which may run other programs, with other sums, than the row among others of its prompt."""
    decoder = load_decoder(tiny_folder, torch.bfloat16, (Action.FULL,))
    cache = new_cache(decoder)
    decoder.rows([cache], [64], [Identity()], is_prompt=True).commit()
    of_prompt, decoded = (decoder.rows([cache], [1], [Identity()], is_prompt=own) for own in (True, False))
    assert decoded.is_decoding
    assert not of_prompt.is_decoding


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("is_widened", [False, True], ids=["usual", "widened"])
def test_a_row_of_a_full_product_is_bit_equal_among_any_number_of_others(
    shape: tuple[int, int], is_widened: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    full = FullLinear(weight.bfloat16(), bias.bfloat16())
    usual = make_full_linear(full)
    if not is_widened and usual is full:
        pytest.skip("the same product here")
    linear = for_many_rows(full if is_widened else usual)
    assert isinstance(linear, AlikeLinear)
    inputs = torch.randn(MAX_ALIKE_ROWS, shape[1], generator=generator).bfloat16()
    expected = linear(inputs)
    torch.testing.assert_close(expected, full(inputs), rtol=0.02, atol=0.01)
    for num_rows in range(1, MAX_ALIKE_ROWS):
        assert torch.equal(linear(inputs[:num_rows]), expected[:num_rows]), num_rows


@pytest.mark.parametrize("alike", [set(), {1, 64}, {2, 64, 128}, {16, 64}, {4, 64, 100}])
def test_rows_that_would_be_summed_apart_are_given_in_numbers_that_are_not(
    alike: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    full = FullLinear(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16())

    class CountedProduct(WidenedLinear):
        def sums(self, inputs: Tensor) -> Tensor:
            given.append(len(inputs))
            return full(inputs)

    linear = AlikeLinear(CountedProduct(full), (16, 32))
    monkeypatch.setattr(AlikeLinear, "_try", lambda self, num_rows: num_rows in alike)
    monkeypatch.setattr("dash_runtime.decoder.full_linear._ALIKE", {})
    inputs = torch.arange(256 * 32).view(256, 32).remainder(7).bfloat16()
    for num_rows in (1, 2, 3, 7, 16, 63, 64, 65, 100, 127, 128, 129, 192, 200, 256):
        torch.testing.assert_close(linear(inputs[:num_rows]), full(inputs[:num_rows]))
    assert set(given) <= alike | {64}


def test_the_activation_rounds_the_same_wherever_a_number_stands() -> None:
    """The ends of what a thread is given may run through other code than the rest, at places that depend on the number
    of rows."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.isfinite()]
    alone = torch.cat([functional.silu(number) for number in numbers.split(1)])
    assert torch.equal(functional.silu(numbers), alone)
