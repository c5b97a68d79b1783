"""Log-likelihoods under teacher forcing: those of transformers at full depth, and others under a policy."""

from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.likelihood import Passage, passage_of, plan_runner
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.policy import fixed_action_plan
from tests.runtime.evaluation_support import CONTEXT, Reference, full_depth, load_reference, runner_of
from tests.runtime.support import load_decoder, some_costs
from tests.tiny_models import NUM_LAYERS

PASSAGES = [
    Passage(list(b"The capital of France is Paris."), 24),
    Passage(list(b"One and one"), 10),
    Passage(list(b"ab"), 1),
]


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Reference:
    return load_reference(tiny_folder)


@pytest.mark.parametrize("max_rows", [1, 1024])
def test_full_depth_likelihoods_are_those_of_transformers(
    decoder: Decoder, reference: Reference, max_rows: int
) -> None:
    scores = full_depth(decoder, max_rows=max_rows)(PASSAGES)
    for passage, score in zip(PASSAGES, scores, strict=True):
        rows = reference(passage.token_ids)[passage.num_given - 1 : -1]
        targets = torch.tensor(passage.token_ids[passage.num_given :])
        expected = rows.gather(1, targets.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(score.log_probs, expected, atol=1e-3, rtol=0)
        assert score.is_greedy == bool((rows.argmax(-1) == targets).all())
        assert score.num_decided == len(targets) - 1
        assert score.total_cost == pytest.approx(score.num_decided)


def test_the_greedy_continuation_is_known_as_such(decoder: Decoder, reference: Reference) -> None:
    token_ids = list(b"Once upon")
    for _ in range(3):
        token_ids.append(int(reference(token_ids)[-1].argmax()))
    others = [*token_ids[:-1], (token_ids[-1] + 1) % 256]
    right, wrong = full_depth(decoder)([Passage(token_ids, 9), Passage(others, 9)])
    assert right.is_greedy
    assert not wrong.is_greedy


def test_a_policy_of_full_layers_changes_nothing_and_one_that_skips_spares_the_first_token(decoder: Decoder) -> None:
    full = full_depth(decoder)(PASSAGES)
    same = runner_of(decoder, Action.FULL)(PASSAGES)
    skipped = runner_of(decoder, Action.SKIP)(PASSAGES)
    for reference, equal, other in zip(full, same, skipped, strict=True):
        torch.testing.assert_close(equal.log_probs, reference.log_probs)
        torch.testing.assert_close(other.log_probs[:1], reference.log_probs[:1])
    assert not torch.allclose(full[0].log_probs[1:], skipped[0].log_probs[1:], atol=1e-2)
    actions = [Action.FULL, *[Action.SKIP] * (NUM_LAYERS - 2), Action.FULL]
    cost = some_costs().token_cost(actions, Action.FULL)
    assert skipped[0].total_cost == pytest.approx(cost * skipped[0].num_decided)


def test_the_first_token_can_be_put_before_the_policy_too(decoder: Decoder) -> None:
    one_token = [Passage(list(b"Question: A"), 10)]
    (served,) = runner_of(decoder, Action.SKIP)(one_token)
    (decided,) = runner_of(decoder, Action.SKIP, decides_first=True)(one_token)
    assert (served.num_decided, served.total_cost) == (0, 0)
    assert decided.num_decided == 1
    assert decided.total_cost < 1
    assert not torch.allclose(served.log_probs, decided.log_probs, atol=1e-3)


def test_a_passage_can_say_what_runs_in_full(decoder: Decoder) -> None:
    ids = list(b"The first words are given, and all of these too")
    run = runner_of(decoder, Action.SKIP)
    (served,), (spoilt,) = run([Passage(ids, 40)]), run([Passage(ids, 40, num_prompt=10)])
    assert spoilt.num_decided == len(ids) - 1 - 10
    assert not torch.allclose(served.log_probs[:1], spoilt.log_probs[:1], atol=1e-3)
    (same,) = run([Passage(ids, 40, num_prompt=40)])
    assert torch.equal(same.log_probs, served.log_probs)


def test_a_fixed_plan_runs_every_layer_of_decided_tokens(decoder: Decoder) -> None:
    full = full_depth(decoder)(PASSAGES)
    plan = fixed_action_plan(Action.INT4, NUM_LAYERS, Identity(), tuple(decoder.heads))
    scores = plan_runner(decoder, plan, some_costs(), context_length=CONTEXT)(PASSAGES)
    cost = some_costs().token_cost([Action.INT4] * NUM_LAYERS, Action.INT8)
    for reference, other in zip(full, scores, strict=True):
        torch.testing.assert_close(other.log_probs[:1], reference.log_probs[:1])
        assert other.total_cost == pytest.approx(cost * other.num_decided)
    assert not torch.allclose(full[0].log_probs[1:], scores[0].log_probs[1:], atol=1e-3)


def test_decided_tokens_have_the_policy_s_head_and_its_cost(decoder: Decoder) -> None:
    full = full_depth(decoder)(PASSAGES[:1])[0]
    cheap = runner_of(decoder, Action.FULL, head=Action.INT8)(PASSAGES[:1])[0]
    assert cheap.log_probs[0] == pytest.approx(float(full.log_probs[0]), abs=1e-4)
    assert not torch.equal(cheap.log_probs[1:], full.log_probs[1:])
    saved = some_costs().head[Action.FULL] - some_costs().head[Action.INT8]
    assert cheap.total_cost == pytest.approx((1 - saved) * cheap.num_decided)


def test_a_passage_that_does_not_fit_the_context_is_refused(decoder: Decoder) -> None:
    run = full_depth(decoder, context_length=8)
    assert len(run([Passage(list(b"123456789"), 4)])) == 1
    with pytest.raises(ConfigError, match=r"context_length: is 8, but .* have 10 tokens"):
        run([Passage(list(b"1234567890"), 4)])


def test_a_token_over_the_boundary_is_scored() -> None:
    words = {"Answer:": 1, " ": 2, " yes": 3, "yes": 4}

    def longest_first(text: str) -> list[int]:
        ids: list[int] = []
        while text:
            word = max((word for word in words if text.startswith(word)), key=len)
            ids.append(words[word])
            text = text.removeprefix(word)
        return ids

    assert passage_of(longest_first, "Answer:", " yes") == Passage([1, 3], 1)
    assert passage_of(longest_first, "Answer: ", " yes") == Passage([1, 2, 3], 2)
    joined = passage_of(longest_first, "Answer: ", "yes")
    assert joined == Passage([1, 3], 1), "the space became part of the answer's token"
    with pytest.raises(ConfigError, match="is not made longer by ''"):
        passage_of(longest_first, "Answer:", "")
    with pytest.raises(ConfigError, match="has no token of its own before"):
        passage_of(longest_first, " ", "yes")
