"""Compares decode speed behind 1,500 tokens of context with that behind 50."""

from benchmarks.contenders import Contender
from benchmarks.figures import Report
from benchmarks.rounds import Effort, Work, interleaved
from benchmarks.setting import FULL_DEPTH, Setting

_SHORT, _LONG = 50, 1500
_MAX_NEW_TOKENS = 64
"""Few, so that the short context stays short."""


def measure_long_context(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds the ratio in both modes."""
    num_tokens = min(effort.num_tokens, _MAX_NEW_TOKENS)
    modes = {"full": (FULL_DEPTH, "≥ 0.85"), "adaptive": (setting.adaptive, "≥ 0.75")}
    works: dict[str, Work] = {}
    for mode, (skip, _) in modes.items():
        contender = setting.ours(skip)
        for length in (_SHORT, _LONG):
            name = f"{mode}_{length}"
            works[name] = _decoding(name, contender, setting.prompts.text(length), num_tokens)
    values = interleaved(report, "long context", works, effort.rounds)
    for mode, (_, target) in modes.items():
        report.add_ratio(f"long_context_ratio_{mode}", values, f"{mode}_{_LONG}", f"{mode}_{_SHORT}", target)
        for length in (_SHORT, _LONG):
            report.add(f"{mode}_tokens_per_second_at_{length}", values.get(f"{mode}_{length}", []))
    report.note(f"long context: {num_tokens} new tokens behind {_SHORT} and {_LONG} tokens of the same plain text")


def _decoding(name: str, contender: Contender, prompt: list[int], num_tokens: int) -> Work:
    return lambda: {name: contender.run([prompt], num_tokens).tokens_per_second}
