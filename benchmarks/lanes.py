"""Compares evaluating the policy on a CPU in the decoder's own thread and in one beside it."""

from collections.abc import Mapping

from benchmarks.contenders import EngineContender
from benchmarks.figures import Report
from benchmarks.rounds import Effort, interleaved
from benchmarks.setting import Setting


def measure_lanes(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds tokens per second and exposed policy time of both lanes, ADAPTIVE, one stream."""
    engines = {"inline": setting.engine, "thread": setting.engine_with_thread_lane}
    contenders = {name: EngineContender(engine, setting.adaptive) for name, engine in engines.items() if engine}

    def work(name: str) -> Mapping[str, float]:
        run = contenders[name].run([setting.prompts.single], effort.num_tokens)
        return {name: run.tokens_per_second, f"{name}_exposed": run.exposed_share}

    works = {name: (lambda name=name: work(name)) for name in contenders}
    values = interleaved(report, "lanes", works, effort.rounds)
    for name in contenders:
        report.add(f"lane_{name}_tokens_per_second", values.get(name, []))
        report.add(f"lane_{name}_exposed_policy_share", values.get(f"{name}_exposed", []))
    report.add_ratio("lane_thread_vs_inline", values, "thread", "inline")
    report.note("lane_*: ADAPTIVE at the same budget, one stream; a thread's exposed time is what the decoder waits")
