"""lm-evaluation-harness's model against transformers; skipped if the harness is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.open_answers import generate, skip_options
from tests.runtime.evaluation_support import CONTEXT, Reference, encode, full_depth, load_reference, make_engine
from tests.runtime.support import load_decoder


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Reference:
    return load_reference(tiny_folder)


def harness_model(decoder: Decoder, context_length: int = CONTEXT) -> Any:
    pytest.importorskip("lm_eval")
    from dash_runtime.evaluation.lm_eval_model import DashModel

    run = full_depth(decoder, context_length=context_length)
    options: dict[str, Any] = {"budget": None, "prefix_token_id": 256, "context_length": context_length}
    return DashModel(run, make_engine(decoder), encode, str, **options)


def instances(kind: str, *arguments: tuple[object, ...]) -> Any:
    from lm_eval.api.instance import Instance  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return [Instance(kind, {}, own, place) for place, own in enumerate(arguments)]  # type: ignore[arg-type,unused-ignore]


def test_the_harness_gets_the_likelihoods_of_transformers(decoder: Decoder, reference: Reference) -> None:
    model = harness_model(decoder, context_length=8)

    def likelihood(token_ids: list[int], num_scored: int) -> float:
        rows = reference(token_ids[:-1])[-num_scored:]
        return float(rows.gather(1, torch.tensor(token_ids[-num_scored:]).unsqueeze(1)).sum())

    pairs = [("ab", " cd"), ("", "xyz"), ("a context that is too long", " end")]
    results = model.loglikelihood(instances("loglikelihood", *pairs))
    expected = [likelihood(list(b"ab cd"), 3), likelihood([256, *b"xyz"], 3), likelihood(list(b" long end"), 4)]
    assert [value for value, _ in results] == pytest.approx(expected, abs=1e-3)
    (rolling,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", ("0123456789ab",)))
    # The second window fills the context; only the tokens that the first did not score count.
    windows = likelihood([256, *b"01234567"], 8) + likelihood(list(b"3456789ab"), 4)
    assert rolling == pytest.approx(windows, abs=1e-3)
    with pytest.raises(ConfigError, match="context_length"):
        model.loglikelihood(instances("loglikelihood", ("a", "a continuation that is too long")))


def test_the_harness_gets_greedy_text_up_to_its_stop_strings(decoder: Decoder) -> None:
    model = harness_model(decoder)
    (plain,) = generate(make_engine(decoder), str, [list(b"One")], skip_options(None), 6)
    wanted = instances(
        "generate_until",
        ("One", {"until": [], "max_gen_toks": 6}),
        ("One", {"until": ",", "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}),
        ("x" * 300 + "One", {"until": ["]"], "max_gen_toks": CONTEXT - 3}),
    )
    first, second, third = model.generate_until(wanted)
    assert first == plain.text
    assert second == plain.text.partition(",")[0]
    assert third.startswith(plain.text[:-1].partition(",")[0])
    with pytest.raises(ConfigError, match="sampling"):
        model.generate_until(instances("generate_until", ("One", {"temperature": 0.7})))
    with pytest.raises(ConfigError, match="max_gen_toks"):
        model.generate_until(instances("generate_until", ("One", {"max_gen_toks": CONTEXT})))
