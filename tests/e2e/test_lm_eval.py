"""lm-evaluation-harness against a real server with a tiny model; skipped if the harness is not installed."""

from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.api.instance import Instance  # type: ignore[import-not-found,import-untyped,unused-ignore]

from dash_client import DashClient, InvalidArgumentError
from dash_client.adapters.lm_eval import DashServedModel

PREFIX = 256


def instances(kind: str, *arguments: tuple[object, ...]) -> Any:
    return [Instance(kind, {}, own, place) for place, own in enumerate(arguments)]  # type: ignore[arg-type,unused-ignore]


@pytest.mark.parametrize("mode", ["full_depth", "adaptive"])
def test_the_harness_gets_the_servers_scores_in_the_order_of_its_questions(client: DashClient, mode: str) -> None:
    model = DashServedModel(client, prefix_token_id=PREFIX, mode=mode)
    pairs = [("ab", " cd"), ("", "xyz"), ("A longer context.", " Its end.")]
    answers = model.loglikelihood(instances("loglikelihood", *pairs))
    expected = [
        client.score(list(b"ab"), list(b" cd"), mode=mode),
        client.score([PREFIX], list(b"xyz"), mode=mode),
        client.score("A longer context.", " Its end.", mode=mode),
    ]
    assert answers == [(score.log_probability, score.is_greedy) for score in expected]
    (rolling,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", ("xyz",)))
    assert rolling == expected[1].log_probability


def test_the_harness_gets_greedy_text_up_to_its_stop_strings(client: DashClient) -> None:
    model = DashServedModel(client, prefix_token_id=PREFIX, mode="full_depth")
    plain = client.generate("One", max_new_tokens=6, mode="full_depth").text
    asked = instances(
        "generate_until",
        ("One", {"until": [], "max_gen_toks": 6}),
        ("One", {"until": [plain[2]], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}),
    )
    assert model.generate_until(asked) == [plain, plain.partition(plain[2])[0]]
    with pytest.raises(InvalidArgumentError, match="sampling"):
        model.generate_until(instances("generate_until", ("One", {"temperature": 0.7})))
    with pytest.raises(InvalidArgumentError, match="max_gen_toks"):
        model.generate_until(instances("generate_until", ("One", {"max_gen_toks": 10**6})))
