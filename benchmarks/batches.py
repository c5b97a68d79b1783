"""Several streams at once: the engine alone, with and without its planner, and transformers batched."""

from benchmarks.contenders import Contender, EngineContender
from benchmarks.figures import Report
from benchmarks.rounds import Effort, Work, interleaved
from benchmarks.setting import FULL_DEPTH, Setting

STREAMS = (1, 4, 8, 16)
_MOST = STREAMS[-1]


def measure_batches(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds tokens per second of all streams together."""
    ours = setting.ours(setting.adaptive)
    works: dict[str, Work] = {}
    for count in STREAMS:
        works[f"tokens_per_second_{count}"] = streaming(
            f"tokens_per_second_{count}", ours, setting, count, effort.stream_tokens
        )
    if setting.engine_without_planner is not None:
        without = EngineContender(setting.engine_without_planner, setting.adaptive)
        for count in STREAMS:
            name = f"throughput_{count}_planner_off"
            works[name] = streaming(name, without, setting, count, effort.stream_tokens)
    full = f"full_depth_tokens_per_second_{_MOST}"
    works[full] = streaming(full, setting.ours(FULL_DEPTH), setting, _MOST, effort.stream_tokens)
    theirs = f"transformers_tokens_per_second_{_MOST}"
    if setting.transformers is not None:
        works[theirs] = streaming(theirs, setting.transformers, setting, _MOST, effort.stream_tokens)
    values = interleaved(report, "streams", works, effort.rounds)
    for name in works:
        report.add(name, values.get(name, []))
    most, one = f"tokens_per_second_{_MOST}", f"tokens_per_second_{STREAMS[0]}"
    report.add_ratio(f"throughput_{_MOST}_vs_1", values, most, one, "≥ 2.5")
    report.add_ratio(f"throughput_{_MOST}_vs_transformers", values, most, theirs, "≥ 2")
    report.add_ratio(f"adaptive_vs_full_{_MOST}", values, most, full, "≥ 1.15")
    report.add_ratio(f"throughput_{_MOST}_planner_on_vs_off", values, most, f"throughput_{_MOST}_planner_off")
    report.note(
        f"streams: ADAPTIVE, {effort.stream_tokens} new tokens of each of up to {_MOST} different prompts of one "
        "length, from when all have their first token to the last; tokens_per_second_N and throughput_N_planner_off "
        "are tokens per second of N streams together"
    )


def streaming(name: str, contender: Contender, setting: Setting, count: int, num_tokens: int) -> Work:
    """Returns what measures the tokens per second of so many streams together, of so many tokens each."""
    prompts = setting.prompts.streams(count)
    return lambda: {name: contender.run(prompts, num_tokens).tokens_per_second}
