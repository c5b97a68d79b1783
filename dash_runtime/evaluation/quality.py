"""Lets one path answer questions: full depth, a fixed plan, or a policy within a budget.

Choices and last words are scored by their log-likelihood, open answers by greedy generation. As in serving, prompts and
the first token after them are always at full depth. One-token choices are therefore the same at every budget, with a
cost share of 1, unless the runner has `decides_first`. Knows questions; knows no files and no layers.
"""

from collections.abc import Callable, Sequence

import torch

from dash_runtime.config import SkipOptions
from dash_runtime.engine.engine import Engine
from dash_runtime.evaluation.accuracy import Answers
from dash_runtime.evaluation.likelihood import Encode, Passage, PassageScore, Run, passage_of
from dash_runtime.evaluation.open_answers import Decode, Generated, answer_in, generate
from dash_runtime.evaluation.programs import code_in, which_pass
from dash_runtime.evaluation.task_files import ChoiceQuestion, OpenQuestion, ProgramQuestion


def question_and_answer(question: str) -> str:
    """Returns the default prompt for a question."""
    return f"Question: {question}\nAnswer:"


def answer_choices(
    run: Run,
    encode: Encode,
    questions: Sequence[ChoiceQuestion],
    *,
    prompt: Callable[[str], str] = question_and_answer,
) -> tuple[Answers, Answers]:
    """Returns the likeliest choices.

    The first answers, `accuracy`, compare the sums of the tokens' log-probabilities. The second, `accuracy_per_byte`,
    divide them by the choice's UTF-8 bytes, which does not favour short choices. The first of equally likely choices is
    taken.

    Raises:
        ConfigError: a question does not fit the context, or a choice has no token.
    """
    passages: list[Passage] = []
    for question in questions:
        start = prompt(question.question)
        for choice in question.choices:
            space = "" if start[-1:].isspace() or choice[0].isspace() else " "
            passages.append(passage_of(encode, start, space + choice))
    scores = run(passages)
    sums = iter([_log_likelihood(score) for score in scores])
    likeliest: list[int] = []
    likeliest_per_byte: list[int] = []
    for question in questions:
        own = [next(sums) for _ in question.choices]
        per_byte = [value / len(choice.encode()) for value, choice in zip(own, question.choices, strict=True)]
        likeliest.append(own.index(max(own)))
        likeliest_per_byte.append(per_byte.index(max(per_byte)))

    def answers(metric: str, chosen: list[int]) -> Answers:
        is_right = tuple(own == question.answer for own, question in zip(chosen, questions, strict=True))
        return Answers(metric, tuple(chosen), is_right, *_paid(scores))

    return answers("accuracy", likeliest), answers("accuracy_per_byte", likeliest_per_byte)


def predict_last_words(run: Run, passages: Sequence[Passage]) -> Answers:
    """Returns whether greedy decoding gives each passage's scored tokens, and their log-likelihoods (`last_word`; made
    by `last_words.py`, after LAMBADA, Paperno et al. 2016)."""
    scores = run(passages)
    is_right = tuple(score.is_greedy for score in scores)
    return Answers("last_word", is_right, is_right, *_paid(scores), tuple(map(_log_likelihood, scores)))


def answer_openly(
    engine: Engine,
    encode: Encode,
    decode: Decode,
    questions: Sequence[OpenQuestion],
    skip: SkipOptions,
    *,
    prompt: Callable[[str], str] = question_and_answer,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
) -> Answers:
    """Returns the answers in which greedy generation ends (`exact_match`).

    Raises:
        InvalidRequest: an option, or a question, does not fit this engine.
    """
    prompts = [encode(prompt(question.question)) for question in questions]
    outputs = generate(engine, decode, prompts, skip, max_new_tokens, stop)
    given = [answer_in(own.text, question.answer) for own, question in zip(outputs, questions, strict=True)]
    wanted = [answer_in(question.answer, question.answer) for question in questions]
    is_right = tuple(own == right for own, right in zip(given, wanted, strict=True))
    return Answers("exact_match", tuple(given), is_right, *_spent(outputs))


def write_programs(
    engine: Engine,
    encode: Encode,
    decode: Decode,
    questions: Sequence[ProgramQuestion],
    skip: SkipOptions,
    *,
    prompt: Callable[[str], str] = question_and_answer,
    max_new_tokens: int = 512,
) -> Answers:
    """Returns whether the programs that greedy generation writes pass their tests (`pass@1`). It runs them.

    Raises:
        InvalidRequest: an option, or a question, does not fit this engine.
        ConfigError: programs cannot be kept from the network here.
    """
    prompts = [encode(prompt(question.question)) for question in questions]
    outputs = generate(engine, decode, prompts, skip, max_new_tokens)
    programs = [question.program(code_in(own.text)) for question, own in zip(questions, outputs, strict=True)]
    is_right = tuple(which_pass(programs))
    return Answers("pass@1", is_right, is_right, *_spent(outputs))


def _log_likelihood(score: PassageScore) -> float:
    return float(score.log_probs.sum(dtype=torch.float64))


def _spent(outputs: Sequence[Generated]) -> tuple[int, float]:
    """Returns the number of decode tokens and what they cost together."""
    return sum(own.num_decode_tokens for own in outputs), sum(own.total_cost for own in outputs)


def _paid(scores: Sequence[PassageScore]) -> tuple[int, float]:
    """Returns the number of decided tokens and what they cost together."""
    return sum(score.num_decided for score in scores), sum(score.total_cost for score in scores)
