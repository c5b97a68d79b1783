"""Benchmarks keep what was measured: medians with their spread, ratios within a round, notes instead of failures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders import EngineContender
from benchmarks.cost_error import Taken, cost_errors
from benchmarks.figures import Figure, Report
from benchmarks.rounds import interleaved
from benchmarks.runs import Run, run_from_arrivals
from dash_runtime.config import GenerationRequest, SkipOptions
from dash_runtime.events import DepthStatistics, EndReason, EngineEvent, SequenceFinished, TokenProduced


def test_a_figure_is_the_median_with_the_lowest_and_the_highest_value() -> None:
    figure = Figure.of("speed", [3.0, 10.0, 1.0, 2.0])
    assert (figure.value, figure.low, figure.high) == (2.5, 1.0, 10.0)


@pytest.mark.parametrize(
    ("target", "value", "is_met", "words"),
    [
        ("≥ 2.0", 2.0, True, "target ≥ 2.0: met"),
        ("≥ 2", 1.99, False, "target ≥ 2: missed"),
        ("≤ 0.03", 0.03, True, "target ≤ 0.03: met"),
        ("≤ 0.03", 0.031, False, "target ≤ 0.03: missed"),
        ("all equal", 1.0, None, "target all equal"),
    ],
)
def test_a_target_is_shown_with_whether_it_is_met(target: str, value: float, is_met: bool | None, words: str) -> None:
    figure = Figure.of("share", [value], target)
    assert figure.is_met is is_met
    assert figure.line().endswith(words)


def test_a_figure_without_a_target_says_nothing_of_one() -> None:
    figure = Figure.of("speed", [1.0])
    assert figure.is_met is None
    assert "target" not in figure.line()


def test_a_ratio_is_taken_within_each_round() -> None:
    report = Report()
    report.add_ratio("ours_vs_theirs", {"ours": [2.0, 30.0, 8.0], "theirs": [1.0, 10.0, 2.0]}, "ours", "theirs")
    (figure,) = report.figures
    assert (figure.value, figure.low, figure.high) == (3.0, 2.0, 4.0)


def test_what_was_not_measured_makes_no_figure() -> None:
    report = Report()
    report.add("speed", [])
    report.add_ratio("ours_vs_theirs", {"ours": [2.0]}, "ours", "theirs")
    assert report.figures == []


def test_the_file_has_the_machine_the_notes_and_every_figure_by_name(tmp_path: Path) -> None:
    report = Report()
    report.add("speed", [1.0, 2.0, 4.0], "≥ 2")
    report.add("size", [5.0])
    report.note("≥ stays readable")
    report.write(tmp_path / "results")
    text = (tmp_path / "results" / "latest.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    assert list(kept) == ["machine", "commit", "command", "failures", "notes", "figures"]
    assert kept["failures"] == []
    assert kept["notes"] == ["≥ stays readable"]
    assert "≥ stays readable" in text
    assert kept["figures"] == {
        "speed": {"value": 2.0, "low": 1.0, "high": 4.0, "target": "≥ 2", "met": True},
        "size": {"value": 5.0, "low": 5.0, "high": 5.0, "target": None, "met": None},
    }


def test_figures_outside_their_earlier_range_are_shown_and_the_earlier_file_is_kept(tmp_path: Path) -> None:
    before, now = Report(), Report()
    for report, speeds in ((before, [1.0, 2.0]), (now, [3.0, 4.0])):
        report.add("speed", speeds)
        report.add("size", [5.0])
    assert now.changes(tmp_path) == []
    before.write(tmp_path)
    _, line = now.changes(tmp_path)
    assert line.split() == ["speed", "1.5", "→", "3.5"]
    now.write(tmp_path)
    assert json.loads((tmp_path / "previous.json").read_text(encoding="utf-8"))["figures"]["speed"]["value"] == 1.5


def test_a_failure_becomes_one_note_with_its_first_line() -> None:
    report = Report()
    with report.attempt("llama.cpp"):
        raise ModuleNotFoundError("No module named 'llama_cpp'\nand more")
    assert report.notes == ["llama.cpp: left out, ModuleNotFoundError: No module named 'llama_cpp'"]
    assert report.failures == ["llama.cpp"]


def test_a_ratio_to_the_best_is_over_the_one_with_the_largest_median_and_names_it() -> None:
    report = Report()
    values = {"ours": [8.0, 8.0, 8.0], "steady": [4.0, 4.0, 4.0], "wild": [1.0, 2.0, 100.0]}
    report.add_ratio_to_best("ours_vs_theirs", values, "ours", ["wild", "steady", "missing"], "≥ 3")
    (figure,) = report.figures
    assert (figure.value, figure.is_met) == (2.0, False)
    assert report.notes == ["ours_vs_theirs: ours over steady, the best of wild, steady"]


class EngineWithReuse:
    """Answers at once, and says that so many tokens of the prompt came from an earlier one."""

    def __init__(self, num_cached: int) -> None:
        self._num_cached = num_cached
        self.has_work = False

    def submit(self, request: GenerationRequest) -> None:
        self.has_work = True

    def step(self) -> list[EngineEvent]:
        self.has_work = False
        depth = DepthStatistics(0, [], {}, 0.0, 0)
        end = SequenceFinished("0", EndReason.LENGTH, 1, 0.1, 0.0, depth, num_cached_prompt_tokens=self._num_cached)
        return [TokenProduced("0", 5), end]

    def cancel(self, request_id: str) -> None:
        pass


def test_a_round_whose_prompt_was_not_computed_whole_is_refused() -> None:
    def run(num_cached: int) -> Run:
        engine: Any = EngineWithReuse(num_cached)
        return EngineContender(engine, SkipOptions()).run([[1, 2, 3]], 1)

    assert run(0).num_tokens == 0  # after the first one
    with pytest.raises(RuntimeError, match="2 prompt tokens came from an earlier prompt, not 0"):
        run(2)


def test_rounds_take_turns_in_alternating_order_and_the_first_is_not_counted() -> None:
    calls: list[str] = []

    def work(name: str) -> Mapping[str, float]:
        calls.append(name)
        return {name: float(len(calls))}

    values = interleaved(Report(), "test", {"a": lambda: work("a"), "b": lambda: work("b")}, rounds=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert values == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_a_contender_that_fails_in_a_later_round_is_left_out_and_the_others_go_on() -> None:
    report = Report()
    results = iter([{"weak": 1.0}, {"weak": 1.0}])
    values = interleaved(report, "test", {"weak": lambda: next(results), "strong": lambda: {"strong": 1.0}}, rounds=3)
    assert values == {"strong": [1.0, 1.0, 1.0]}
    assert report.notes == ["test, weak: left out, StopIteration: no message"]


def test_a_run_counts_from_when_every_stream_has_its_first_token() -> None:
    run = run_from_arrivals(1.0, [[(2.0, 1), (3.0, 1), (5.0, 2)], [(3.0, 1), (4.0, 1), (7.0, 1)]])
    assert (run.seconds_to_first, run.seconds, run.num_tokens) == (2.0, 4.0, 4)
    assert run.tokens_per_second == 1.0


def test_a_stream_without_a_token_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match="without a token"):
        run_from_arrivals(0.0, [[(1.0, 1)], []])


def test_what_a_mode_took_is_in_full_depths_tokens_of_the_same_rounds() -> None:
    taken = {"full": Taken([1.0, 1.0, 1.0], [2.0, 4.0, 2.0]), "int4": Taken([0.4, 0.4, 0.4], [1.0, 2.0, 1.5])}
    assert cost_errors(taken) == {"full": (1.0, 1.0), "int4": (0.4, 0.5)}


def test_rounds_end_when_the_time_is_over_and_keep_what_was_measured() -> None:
    report, taken = Report(), list[str]()

    def work() -> Mapping[str, float]:
        taken.append("run")
        return {"speed": float(len(taken))}

    values = interleaved(report, "decoding", {"ours": work}, 5, has_time=lambda: len(taken) < 3)
    assert values == {"speed": [2.0, 3.0]}
    assert report.notes == ["decoding: 2 of 5 rounds, since the time is over"]
