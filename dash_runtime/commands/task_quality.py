"""The tasks of `dash-policy evaluate`: questions with known answers, and last words, on every path.

Knows options, files and tables; the figures come from evaluation/.
"""

import argparse
from collections.abc import Callable, Sequence

from dash_runtime.actions import CostTable
from dash_runtime.engine.engine import Engine
from dash_runtime.evaluation.accuracy import Accuracy, Answers, Estimate, judge
from dash_runtime.evaluation.last_words import last_word_passages
from dash_runtime.evaluation.likelihood import Passage
from dash_runtime.evaluation.programs import require_isolation
from dash_runtime.evaluation.quality import (
    answer_choices,
    answer_openly,
    predict_last_words,
    question_and_answer,
    write_programs,
)
from dash_runtime.evaluation.task_files import ChoiceQuestion, OpenQuestion, ProgramQuestion, read_tasks
from dash_runtime.evaluation.task_paths import TaskPath, plans_everywhere, task_paths
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import FixedPlan
from dash_runtime.training.loaded_model import LoadedModel

_NUM_LAST_WORDS = 400

EngineOf = Callable[[LearnedPolicy, CostTable], Engine]
"""Returns an engine with a policy, whose other plans have these costs."""


def evaluate_tasks(
    options: argparse.Namespace, model: LoadedModel, policies: Sequence[LearnedPolicy], engine_of: EngineOf
) -> list[Accuracy]:
    """Prints and returns the accuracy of every path on the tasks that the options name, full depth's first.

    Raises:
        DashRuntimeError: a file cannot be used, or a question does not fit the model.
    """
    tasks = _Tasks(options, model)
    plans = plans_everywhere(model.decoder)
    costs = _costs_of(plans, policies)
    if costs is None:
        costs = model.measured_costs(policies[0].compensation)

    def engine_for(policy: LearnedPolicy | None) -> Engine:
        return engine_of(policies[0], costs) if policy is None else engine_of(policy, policy.costs)

    paths = task_paths(model.decoder, costs, policies, options.budgets, plans, model.context_length)
    full_depth: dict[str, Answers] = {}
    rows: list[Accuracy] = []
    _print_heading()
    for path in paths:
        for answers in tasks.answers(path, engine_for):
            reference = full_depth.get(answers.metric)
            full_depth.setdefault(answers.metric, answers)
            row = judge(answers, reference, name=path.name, kind=path.kind, budget=path.budget)
            _print_row(row)
            rows.append(row)
    return rows


def _costs_of(plans: Sequence[FixedPlan], policies: Sequence[LearnedPolicy]) -> CostTable | None:
    """Returns the first policy's costs that price all plans, so that their lines compare with its own; else None."""
    actions, heads = {action for plan in plans for action in plan.plan}, {plan.head for plan in plans}
    tables = (policy.costs for policy in policies)
    return next((own for own in tables if actions <= own.layer.keys() and heads <= own.head.keys()), None)


class _Tasks:
    """The questions that the options name, ready to be asked."""

    def __init__(self, options: argparse.Namespace, model: LoadedModel) -> None:
        self._model = model
        questions = [] if options.tasks is None else read_tasks(options.tasks)
        self._choice_questions = [question for question in questions if isinstance(question, ChoiceQuestion)]
        self._open_questions = [question for question in questions if isinstance(question, OpenQuestion)]
        self._programs = [question for question in questions if isinstance(question, ProgramQuestion)]
        if self._programs:
            require_isolation()
        self._passages: list[Passage] = []
        if options.last_words is not None:
            self._passages = last_word_passages(
                options.last_words, self._encode, options.prompt_tokens, _NUM_LAST_WORDS
            )

    def answers(self, path: TaskPath, engine_for: Callable[[LearnedPolicy | None], Engine]) -> list[Answers]:
        """Returns the answers of one path by task; an engine that cannot run it is not asked."""
        found: list[Answers] = []
        if self._choice_questions:
            found += answer_choices(path.run, self._encode, self._choice_questions)
        if self._passages:
            found.append(predict_last_words(path.run, self._passages))
        if (self._open_questions or self._programs) and path.skip is not None:
            has_template = self._model.chat_template.source is not None
            prompt = self._chat if has_template else question_and_answer
            asked = (engine_for(path.policy), self._encode, self._decode)
            if self._open_questions:
                found.append(answer_openly(*asked, self._open_questions, path.skip, prompt=prompt))
            else:
                found.append(write_programs(*asked, self._programs, path.skip, prompt=prompt))
        return found

    def _encode(self, text: str) -> list[int]:
        return list(self._model.tokenizer.encode(text, add_special_tokens=False).ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._model.tokenizer.decode(list(token_ids)))

    def _chat(self, question: str) -> str:
        return self._model.chat_template.render([("user", question)])


def _print_heading() -> None:
    print(
        f"\n{'name':28} {'metric':18} {'budget':>6} {'cost':>6} {'accuracy (95 %)':>20} {'log-lik.':>8} "
        f"{'changed (95 %)':>20} {'lost':>6} {'gained':>6} {'count':>6}"
    )


def _print_row(row: Accuracy) -> None:
    asked = "" if row.budget is None else f"{row.budget:.3f}"
    likelihood = "" if row.log_likelihood is None else f"{row.log_likelihood.mean:.3f}"
    lost, gained = ("" if own is None else f"{own.mean:.3f}" for own in (row.lost, row.gained))
    print(
        f"{row.name:28} {row.metric:18} {asked:>6} {row.cost_share:6.3f} {_with_interval(row.accuracy):>20} "
        f"{likelihood:>8} {_with_interval(row.changed):>20} {lost:>6} {gained:>6} {row.count:6}",
        flush=True,
    )


def _with_interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:.3f} {estimate.low:.3f}–{estimate.high:.3f}"
