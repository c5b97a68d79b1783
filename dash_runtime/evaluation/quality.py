"""Counts the questions that a model gets right, at full depth or within a budget.

Choices are scored by their log-likelihood, open answers by greedy generation. As in serving, prompts and the first
token after them are always at full depth. One-token choices are therefore the same at every budget, with a cost share
of 1, unless the runner has `decides_first`. Knows questions; knows no files and no layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from dash_runtime.engine.engine import Engine
from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.likelihood import Encode, Passage, Run, passage_of
from dash_runtime.evaluation.open_answers import Decode, generate, is_match, skip_options
from dash_runtime.evaluation.task_files import ChoiceQuestion, OpenQuestion


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One figure of the table.

    `budget` is None at full depth. `standard_error` is the binomial one. `cost_share` is the mean cost of the tokens
    that a policy could decide, as a share of the full-depth token, head included; 1 if there were none.
    """

    name: str
    metric: str
    budget: float | None
    accuracy: float
    standard_error: float
    count: int
    cost_share: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def question_and_answer(question: str) -> str:
    """Returns the default prompt for a question."""
    return f"Question: {question}\nAnswer:"


def score_choices(
    run: Run,
    encode: Encode,
    questions: Sequence[ChoiceQuestion],
    name: str,
    budget: float | None,
    *,
    prompt: Callable[[str], str] = question_and_answer,
) -> tuple[Accuracy, Accuracy]:
    """Returns how often the right choice is the likeliest.

    The first figure, `accuracy`, compares the sums of the tokens' log-probabilities. The second, `accuracy_per_byte`,
    divides them by the choice's UTF-8 bytes, which does not favour short choices. `name` and `budget` describe `run`.
    The first of equally likely choices is taken.

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
    num_decided, cost = sum(score.num_decided for score in scores), sum(score.total_cost for score in scores)
    sums = iter([float(score.log_probs.sum(dtype=torch.float64)) for score in scores])
    num_right = num_right_per_byte = 0
    for question in questions:
        own = [next(sums) for _ in question.choices]
        per_byte = [value / len(choice.encode()) for value, choice in zip(own, question.choices, strict=True)]
        num_right += own.index(max(own)) == question.answer
        num_right_per_byte += per_byte.index(max(per_byte)) == question.answer
    count = len(questions)
    return (
        _accuracy(name, "accuracy", budget, num_right, count, num_decided, cost),
        _accuracy(name, "accuracy_per_byte", budget, num_right_per_byte, count, num_decided, cost),
    )


def score_answers(
    engine: Engine,
    encode: Encode,
    decode: Decode,
    questions: Sequence[OpenQuestion],
    name: str,
    budget: float | None,
    *,
    policy_name: str | None = None,
    prompt: Callable[[str], str] = question_and_answer,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
) -> Accuracy:
    """Returns how often greedy generation ends in the reference's answer (`exact_match`). `budget` is None for full
    depth.

    Raises:
        InvalidRequest: the budget, or a question, does not fit this engine.
    """
    skip = skip_options(budget, policy_name)
    prompts = [encode(prompt(question.question)) for question in questions]
    outputs = generate(engine, decode, prompts, skip, max_new_tokens, stop)
    num_right = sum(is_match(own.text, question.answer) for own, question in zip(outputs, questions, strict=True))
    num_decided, cost = sum(own.num_decode_tokens for own in outputs), sum(own.total_cost for own in outputs)
    return _accuracy(name, "exact_match", budget, num_right, len(questions), num_decided, cost)


def _accuracy(
    name: str, metric: str, budget: float | None, num_right: int, count: int, num_decided: int, cost: float
) -> Accuracy:
    if count == 0:
        raise ConfigError("tasks", "has no questions")
    share = num_right / count
    error = math.sqrt(share * (1 - share) / count)
    return Accuracy(name, metric, budget, share, error, count, cost / num_decided if num_decided else 1.0)
