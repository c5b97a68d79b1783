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
from dash_runtime.evaluation.accuracy import Answers, estimate, judge
from dash_runtime.evaluation.last_words import last_word_passages
from dash_runtime.evaluation.likelihood import Passage, PassageScore, Run
from dash_runtime.evaluation.open_answers import generate, skip_options
from dash_runtime.evaluation.quality import answer_choices, answer_openly, predict_last_words, question_and_answer
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
    raw, per_byte = answer_choices(run, encode, questions)
    assert raw == Answers("accuracy", (0, 0, 0, 0), (True, False, True, True), 16, 12.0)
    assert (per_byte.metric, per_byte.is_right) == ("accuracy_per_byte", (False, True, False, True))
    assert seen[0] == "Question: q1\nAnswer: short"


def test_a_line_has_intervals_and_what_changed_against_full_depth() -> None:
    full = Answers("accuracy", (0, 1, 0, 0), (True, True, False, False), 0, 0.0)
    other = Answers("accuracy", (0, 2, 1, 0), (True, False, True, False), 8, 6.0, (-1.0, -2.0, -3.0, -4.0))
    first = judge(full, None, name="full depth", kind="full_depth", budget=None)
    assert (first.cost_share, first.changed, first.log_likelihood) == (1.0, None, None)
    row = judge(other, full, name="mine", kind="policy", budget=0.7)
    again = judge(other, full, name="mine", kind="policy", budget=0.7)
    assert row == again, "the bootstrap has a seed"
    facts = json.loads(json.dumps(row.to_json()))
    expected = {"name": "mine", "kind": "policy", "metric": "accuracy", "budget": 0.7, "accuracy": 0.5, "count": 4}
    expected |= {"cost_share": 0.75, "log_likelihood": -2.5, "changed": 0.5, "lost": 0.25, "gained": 0.25, "gain": 0.0}
    assert {name: facts[name] for name in expected} == expected
    low, high = facts["accuracy_interval"]
    assert 0 <= low < 0.5 < high <= 1


def test_an_interval_is_as_wide_as_the_binomial_one() -> None:
    answers = estimate([place % 4 == 0 for place in range(800)])
    half_width = 1.96 * (0.25 * 0.75 / 800) ** 0.5
    assert (answers.mean - answers.low, answers.high - answers.mean) == pytest.approx((half_width,) * 2, rel=0.1)


def test_the_caller_s_prompt_is_kept_and_no_second_space_added() -> None:
    run, seen = fake_run({"yes": -1, " no": -2})
    answer_choices(run, encode, [ChoiceQuestion("Is it?", ("yes", " no"), 0)], prompt=lambda text: text + "\n")
    assert seen == ["Is it?\nyes", "Is it?\n no"]


def test_full_depth_and_a_budget_stand_side_by_side(decoder: Decoder, tokenizer: Tokenizer) -> None:
    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    questions = [ChoiceQuestion(f"What is {n}?", ("a number", "a bird", "nothing at all"), 0) for n in range(4)]
    full = answer_choices(full_depth(decoder), tokens, questions)
    skips = answer_choices(runner_of(decoder, Action.SKIP), tokens, questions)
    assert [own.total_cost for own in full] == pytest.approx([own.num_decided for own in full])
    assert skips[0].total_cost < 0.7 * skips[0].num_decided
    assert all(len(own.is_right) == 4 for own in (*full, *skips))


def test_no_questions_have_no_accuracy() -> None:
    with pytest.raises(ConfigError, match="no questions"):
        judge(answer_choices(lambda passages: [], encode, [])[0], None, name="m", kind="policy", budget=None)


def test_answers_are_scored_at_full_depth_and_at_a_budget(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    questions = [OpenQuestion("1 + 1?", "#### 2"), OpenQuestion("What?", "no such answer")]
    prompts = [encode(question_and_answer(question.question)) for question in questions]
    first = generate(engine, str, prompts, skip_options(None), 6)[0].text
    questions[0] = OpenQuestion("1 + 1?", first)
    full = answer_openly(engine, encode, str, questions, skip_options(None), max_new_tokens=6)
    assert (full.metric, full.is_right) == ("exact_match", (True, False))
    assert full.total_cost == pytest.approx(full.num_decided)
    random = answer_openly(engine, encode, str, questions, skip_options(0.6), max_new_tokens=6)
    assert random.total_cost / random.num_decided == pytest.approx(0.6, abs=0.15)


def test_a_question_that_does_not_fit_the_engine_is_named(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    questions = [OpenQuestion("1?", "1"), OpenQuestion("long " * 40, "2")]
    with pytest.raises(InvalidRequest, match=r"prompt: .*context length is 128.*\(prompt 2\)"):
        answer_openly(engine, encode, decode, questions, skip_options(None), max_new_tokens=6)
    assert not engine.has_work
    with pytest.raises(InvalidRequest, match="compute_budget"):
        answer_openly(engine, encode, decode, questions[:1], skip_options(1.5))


PARAGRAPH = (
    "The bird sat on " + "a very high and very old branch of " * 3 + "the tree, and then it left the tree. It flew!"
)


def test_a_last_word_is_one_that_came_before(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    others = ["", "Too short a tree. A tree.", PARAGRAPH.replace("the tree, ", "")]
    text.write_text("\n".join([f"\ufeff{PARAGRAPH}", *others, PARAGRAPH]))
    passages = last_word_passages(text, encode, 16, 400)
    start = PARAGRAPH[: PARAGRAPH.index(" tree. It")]
    ids = encode(f"{start} tree")[-128:]
    assert passages == [Passage(ids, len(ids) - 5, 16)] * 2
    assert len(last_word_passages(text, encode, 16, 1)) == 1


def test_last_words_are_right_if_decoding_would_give_them(decoder: Decoder) -> None:
    run, _ = fake_run({" a": -1, " b": -2.5})
    answers = predict_last_words(run, [Passage(encode("It is a"), 5), Passage(encode("It is b"), 5)])
    assert answers == Answers("last_word", (False, False), (False, False), 4, 3.0, (-1.0, -2.5))


@pytest.mark.parametrize("content", [b"", b"Too short.\n", b"\xff"])
def test_a_text_without_last_words_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    for path in (text, tmp_path / "missing.txt", tmp_path):
        with pytest.raises(ConfigError, match=f"last-words: {path}"):
            last_word_passages(path, encode, 16, 10)
