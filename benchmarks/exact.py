"""EXACT over many prompts: its speed beside full depth's and transformers', and how its drafts fared.

Each prompt is one round, in which all contenders take turns: the spread of a figure is over the prompts.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.figures import Report
from benchmarks.rounds import Effort, progress
from benchmarks.setting import FULL_DEPTH, Setting
from dash_runtime.config import GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.events import SequenceFinished, SpeculationStatistics, TokenProduced

SKIP_ONLY = SkipOptions(Mode.EXACT, policy_name="smollm2-135m-skip")
DIVERGENCE_POLICY = SkipOptions(Mode.EXACT, policy_name="smollm2-135m-four-actions")
_EARLY_EXIT_LAYER = 20
_LOOKED_UP_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Output:
    """Greedy tokens, tokens per second after the first one, and the draft statistics of mode EXACT."""

    token_ids: list[int]
    tokens_per_second: float
    speculation: SpeculationStatistics | None


def generate(engine: Engine, prompt: list[int], skip: SkipOptions, num_tokens: int) -> Output:
    """Generates one greedy sequence alone."""
    stopping = StoppingParameters(num_tokens, ignore_eos=True)
    engine.submit(GenerationRequest("exact", prompt, stopping, skip=skip))
    token_ids: list[int] = []
    first = last = 0.0
    speculation = None
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenProduced):
                last = time.perf_counter()
                first = first or last
                token_ids.append(event.token_id)
            elif isinstance(event, SequenceFinished):
                speculation = event.speculation
    return Output(token_ids, (num_tokens - 1) / (last - first), speculation)


def measure_exact(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds the ratios, how often tokens equal full depth's, and the time of drafts and verifications."""
    drafters = {"exact": SkipOptions(Mode.EXACT), "exact_skip_only": SKIP_ONLY, "exact_policy": DIVERGENCE_POLICY}
    outputs: dict[str, list[Output]] = {name: [] for name in ("full_depth", *drafters)}
    speeds: dict[str, list[float]] = {name: [] for name in ("transformers", "early_exit", "prompt_lookup")}
    generate(setting.engine, setting.prompts.exact[0], SkipOptions(Mode.EXACT), effort.num_tokens)  # warms up
    for number, prompt in enumerate(setting.prompts.exact, start=1):
        progress(f"exact: prompt {number} of {len(setting.prompts.exact)}")
        for name, skip in {"full_depth": FULL_DEPTH, **drafters}.items():
            outputs[name].append(generate(setting.engine, prompt, skip, effort.num_tokens))
        for name, options in _ASSISTANCE.items():
            if setting.transformers is not None:
                with report.attempt(f"exact, {name}"):
                    run = setting.transformers.run([prompt], effort.num_tokens // 2, **options)
                    speeds[name].append(run.tokens_per_second)
    values = speeds | {name: [own.tokens_per_second for own in runs] for name, runs in outputs.items()}
    values = {name: own for name, own in values.items() if len(own) == len(setting.prompts.exact)}
    report.add_ratio("exact_vs_full_depth", values, "exact", "full_depth", "≥ 1.8")
    ratios = [a / b for a, b in zip(values["exact"], values["full_depth"], strict=True)]
    report.add("exact_worst_prompt", [min(ratios)], "≥ 0.95")
    report.add_ratio("exact_vs_transformers", values, "exact", "transformers", "≥ 3")
    for name in ("exact_skip_only", "exact_policy"):
        report.add_ratio(f"{name}_vs_full_depth", values, name, "full_depth")
    for name in ("early_exit", "prompt_lookup"):
        report.add_ratio(f"transformers_{name}_vs_transformers", values, name, "transformers")
    for name in ("full_depth", *drafters, *speeds):
        report.add(f"{name}_tokens_per_second_over_prompts", values.get(name, []))
    for name in drafters:
        equal = [
            own.token_ids == full.token_ids for own, full in zip(outputs[name], outputs["full_depth"], strict=True)
        ]
        report.add(f"{name}_prompts_equal_to_full_depth", [statistics.fmean(equal)])
        _add_drafts(report, name, [own.speculation for own in outputs[name] if own.speculation is not None])
    report.note(
        f"exact: {len(setting.prompts.exact)} prompts (benchmarks/exact_prompts.py), greedy, {effort.num_tokens} new "
        f"tokens, bf16, one stream; drafter {setting.engine.facts.policy(None, Mode.EXACT).name}; spreads are over the "
        "prompts. The embedded model's file is 4-bit, which flatters a drafter in INT4: exact_skip_only drafts without"
    )
    report.note(
        f"transformers, same prompts, half as many tokens; assisted: assistant_early_exit={_EARLY_EXIT_LAYER} and "
        f"prompt_lookup_num_tokens={_LOOKED_UP_TOKENS}, its defaults otherwise"
    )


_ASSISTANCE: Mapping[str, dict[str, int]] = {
    "transformers": {},
    "early_exit": {"assistant_early_exit": _EARLY_EXIT_LAYER},
    "prompt_lookup": {"prompt_lookup_num_tokens": _LOOKED_UP_TOKENS},
}


def _add_drafts(report: Report, name: str, drafts: list[SpeculationStatistics]) -> None:
    """Adds rates and times over the prompts that drafted."""
    drafting = [own for own in drafts if own.num_drafted]
    report.add(f"{name}_prompts_drafted", [len(drafting) / len(drafts)])
    report.add(f"{name}_acceptance_rate", [own.num_accepted / own.num_drafted for own in drafting])
    report.add(f"{name}_drafted_per_verification", [own.num_drafted / own.num_verifications for own in drafting])
    report.add(f"{name}_draft_ms_per_drafted_token", [own.draft_ns / 1e6 / own.num_drafted for own in drafting])
    report.add(f"{name}_ms_per_verification", [own.verification_ns / 1e6 / own.num_verifications for own in drafting])
    report.add(
        f"{name}_draft_share_of_time",
        [own.draft_ns / (own.draft_ns + own.verification_ns) for own in drafting],
    )
