"""Accuracy at full depth and at each budget, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from dash_runtime.actions import Action
from dash_runtime.checkpoints import tokenizer_file
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError, InvalidRequest
from dash_runtime.evaluation.likelihood import Passage, PassageScore, Run
from dash_runtime.evaluation.open_answers import generate, skip_options
from dash_runtime.evaluation.quality import Accuracy, question_and_answer, score_answers, score_choices
from dash_runtime.evaluation.task_files import ChoiceQuestion, OpenQuestion
from tests.runtime.evaluation_support import decode, encode, full_depth, make_engine, runner_of
from tests.runtime.support import load_decoder


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file(tiny_folder)))


def fake_run(likelihoods: dict[str, float]) -> tuple[Run, list[str]]:
    """Returns a runner that scores each continuation by its text, all of it in the first token."""
    seen: list[str] = []

    def run(passages: Sequence[Passage]) -> list[PassageScore]:
        scores = []
        for passage in passages:
            text = decode(passage.token_ids[passage.num_given :])
            seen.append(decode(passage.token_ids))
            log_probs = torch.zeros(len(passage.token_ids) - passage.num_given)
            log_probs[0] = likelihoods[text]
            scores.append(PassageScore(log_probs, False, 2, 1.5))
        return scores

    return run, seen


def test_raw_and_per_byte_accuracy_differ_in_what_length_is_worth() -> None:
    questions = [
        ChoiceQuestion("q1", ("short", "a much longer one"), 0),
        ChoiceQuestion("q2", ("short", "a much longer one"), 1),
        ChoiceQuestion("q3", ("é", "eee"), 0),
        ChoiceQuestion("q4", ("z", "z"), 0),
    ]
    # Per byte: -0.8 and -0.29; é is two bytes, -1.5 each against -1.1.
    run, seen = fake_run({" short": -4, " a much longer one": -5, " é": -3.0, " eee": -3.3, " z": -1})
    raw, per_byte = score_choices(run, encode, questions, "mine", 0.7)
    assert raw == Accuracy("mine", "accuracy", 0.7, 0.75, (0.75 * 0.25 / 4) ** 0.5, 4, 0.75)
    assert (per_byte.metric, per_byte.accuracy) == ("accuracy_per_byte", 0.5)
    assert seen[0] == "Question: q1\nAnswer: short"
    assert json.loads(json.dumps(raw.to_json())) == {
        "name": "mine",
        "metric": "accuracy",
        "budget": 0.7,
        "accuracy": 0.75,
        "standard_error": raw.standard_error,
        "count": 4,
        "cost_share": 0.75,
    }


def test_the_caller_s_prompt_is_kept_and_no_second_space_added() -> None:
    run, seen = fake_run({"yes": -1, " no": -2})
    score_choices(
        run, encode, [ChoiceQuestion("Is it?", ("yes", " no"), 0)], "m", None, prompt=lambda text: text + "\n"
    )
    assert seen == ["Is it?\nyes", "Is it?\n no"]


def test_full_depth_and_a_budget_stand_side_by_side(decoder: Decoder, tokenizer: Tokenizer) -> None:
    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    questions = [ChoiceQuestion(f"What is {n}?", ("a number", "a bird", "nothing at all"), 0) for n in range(4)]
    full = score_choices(full_depth(decoder), tokens, questions, "full depth", None)
    skips = score_choices(runner_of(decoder, Action.SKIP), tokens, questions, "skips", 0.5)
    assert [row.cost_share for row in full] == pytest.approx([1, 1])
    assert skips[0].cost_share < 0.7
    assert all(0 <= row.accuracy <= 1 and row.count == 4 for row in (*full, *skips))


def test_no_questions_have_no_accuracy() -> None:
    with pytest.raises(ConfigError, match="no questions"):
        score_choices(lambda passages: [], encode, [], "m", None)


def test_answers_are_scored_at_full_depth_and_at_a_budget(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    questions = [OpenQuestion("1 + 1?", "#### 2"), OpenQuestion("What?", "no such answer")]
    prompts = [encode(question_and_answer(question.question)) for question in questions]
    first = generate(engine, str, prompts, skip_options(None), 6)[0].text
    questions[0] = OpenQuestion("1 + 1?", first)
    full = score_answers(engine, encode, str, questions, "full depth", None, max_new_tokens=6)
    assert full == Accuracy("full depth", "exact_match", None, 0.5, 0.125**0.5, 2, full.cost_share)
    assert full.cost_share == pytest.approx(1)
    random = score_answers(engine, encode, str, questions, "random", 0.6, max_new_tokens=6)
    assert random.budget == 0.6
    assert random.cost_share == pytest.approx(0.6, abs=0.15)


def test_a_question_that_does_not_fit_the_engine_is_named(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    questions = [OpenQuestion("1?", "1"), OpenQuestion("long " * 40, "2")]
    with pytest.raises(InvalidRequest, match=r"prompt: .*context length is 128.*\(prompt 2\)"):
        score_answers(engine, encode, decode, questions, "m", None, max_new_tokens=6)
    assert not engine.has_work
    with pytest.raises(InvalidRequest, match="compute_budget"):
        score_answers(engine, encode, decode, questions[:1], "m", 1.5)
