"""Compares decode speed with prompt lookup with that without, which has the same output in a fixed plan.

Each prompt is one round, in which all modes take turns: the spread of a figure is over the prompts.
"""

from collections.abc import Sequence

from benchmarks.exact import answer_length, generate
from benchmarks.figures import Report
from benchmarks.rounds import Effort, progress
from benchmarks.setting import AS_SERVED, FULL_DEPTH, INT4, Setting


def measure_lookup(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds the ratio of each mode, over usual prompts and over those whose answers copy much of them."""
    engines = {"with": setting.build(AS_SERVED), "without": setting.engine}
    modes = {"full_depth": FULL_DEPTH, "int4": INT4, "adaptive": setting.adaptive}
    prompts = setting.prompts
    for engine in engines.values():
        generate(engine, prompts.exact[0], INT4, effort.num_tokens)  # warms up

    def measure(kind: str, own: Sequence[list[int]]) -> None:
        speeds: dict[str, list[float]] = {f"{mode}_{name}": [] for mode in modes for name in engines}
        for number, prompt in enumerate(own, start=1):
            progress(f"lookup{kind}: prompt {number} of {len(own)}")
            # Behind its end an answer may repeat itself for ever.
            num_tokens = answer_length(setting.engine, prompt, effort.num_tokens)
            for mode, skip in modes.items():
                outputs = {name: generate(engine, prompt, skip, num_tokens) for name, engine in engines.items()}
                for name, output in outputs.items():
                    speeds[f"{mode}_{name}"].append(output.tokens_per_second)
        for mode in modes:
            report.add_ratio(f"lookup{kind}_{mode}", speeds, f"{mode}_with", f"{mode}_without")
        report.add_ratio(f"lookup{kind}_adaptive_vs_int4", speeds, "adaptive_with", "int4_with")

    measure("", prompts.exact)
    measure("_copy", prompts.copying)
    engines["with"].close()
    report.note(
        f"lookup: tokens per second with DASH_PROMPT_LOOKUP over without, greedy, one stream; {len(prompts.exact)} "
        f"prompts, lookup_copy: {len(prompts.copying)} whose answers repeat much of the prompt; up to "
        f"{effort.num_tokens} new tokens, or as many as full depth's answer has; spreads are over the prompts. All "
        "other figures are without"
    )
