"""Generated answers are greedy, end in the right place, and are compared by their last number."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from dash_runtime.decoder.decoder import Decoder
from dash_runtime.evaluation.open_answers import answer_in, generate, last_number, skip_options
from tests.runtime.evaluation_support import Reference, load_reference, make_engine
from tests.runtime.support import load_decoder


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Reference:
    return load_reference(tiny_folder)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 / 2 = 24, so 48 + 24 = 72.\n#### 72", "72"),
        ("#### 1,072", "1072"),
        ("It costs $1,234,567.50.", "1234567.5"),
        ("The answer is 72.", "72"),
        ("about 72.00", "72"),
        ("at -5 degrees", "-5"),
        ("a loss of -$5", "-5"),
        ("he has 10-5", "5"),
        ("(4)-3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("half is .5", "0.5"),
        ("50%", "50"),
        ("no number here.", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("So she sold 72.", "48 and 24.\n#### 72", True),
        ("72 of 80", "#### 72", False),
        ("She has $1,000.00!", "#### 1000", True),
        ("I do not know", "#### 72", False),
        (" It is\nPARIS. ", "it is Paris", True),
        ("It is in Paris", "Paris", False),
    ],
)
def test_exact_match(text: str, reference: str, expected: bool) -> None:
    assert (answer_in(text, reference) == answer_in(reference, reference)) is expected


def test_generation_is_greedy_and_full_depth_costs_one(decoder: Decoder, reference: Reference) -> None:
    prompts = [list(b"One"), list(b"Another prompt"), list(b"x")]
    outputs = generate(make_engine(decoder), str, prompts, skip_options(None), 4)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = list(prompt)
        for _ in range(4):
            expected.append(int(reference(expected)[-1].argmax()))
        assert output.text == str(expected[len(prompt) :])
        assert (output.num_decode_tokens, output.total_cost) == (3, pytest.approx(3))


def test_generation_ends_before_the_end_token_and_before_a_stop_string(decoder: Decoder) -> None:
    engine, prompt = make_engine(decoder), list(b"One")
    (plain,) = generate(engine, str, [prompt], skip_options(None), 12)
    ids = json.loads(plain.text)
    end = next(place for place in range(3, 12) if ids.index(ids[place]) == place)
    (ended,) = generate(make_engine(decoder, frozenset((ids[end],))), str, [prompt], skip_options(None), 12)
    assert json.loads(ended.text) == ids[:end]
    stop = f", {ids[2]}, {ids[3]}"
    (stopped,) = generate(engine, str, [prompt], skip_options(None), 12, ("never", stop))
    assert stopped.text == str(ids[:2])[:-1]
    assert stopped.num_decode_tokens < plain.num_decode_tokens
    assert not engine.has_work
    assert engine.num_reserved_cache_tokens == 0
