"""EXACT over many prompts: its speed beside full depth's as it is served, with prompt lookup, and transformers', and
how its drafts fared.

Each prompt is one round, in which all contenders take turns: the spread of a figure is over the prompts.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from benchmarks.batches import streaming
from benchmarks.contenders import EngineContender, require_cached
from benchmarks.figures import Report
from benchmarks.rounds import Effort, interleaved, progress
from benchmarks.setting import AS_SERVED, FULL_DEPTH, Setting
from dash_runtime.config import GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.events import SequenceFinished, SpeculationStatistics, TokenProduced

SKIP_ONLY = SkipOptions(Mode.EXACT, policy_name="smollm2-135m-skip")
DIVERGENCE_POLICY = SkipOptions(Mode.EXACT, policy_name="smollm2-135m-four-actions")
_LOOKED_UP_TOKENS = 10
_STREAMS = {4: "≥ 1", 16: "≥ 1"}
_SHORTEST_ANSWER = 24
"""Tokens; a shorter answer says little about speed."""


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
                require_cached(event.num_cached_prompt_tokens, 0)
                speculation = event.speculation
    return Output(token_ids, (num_tokens - 1) / (last - first), speculation)


def answer_length(engine: Engine, prompt: list[int], most: int) -> int:
    """Returns the number of tokens to the end of full depth's answer."""
    token_ids = generate(engine, prompt, FULL_DEPTH, most).token_ids
    ends = (place for place, token_id in enumerate(token_ids) if token_id in engine.facts.eos_token_ids)
    return max(_SHORTEST_ANSWER, next(ends, len(token_ids)))


def measure_exact(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds the ratios, how often tokens equal full depth's, and the time of drafts and verifications."""
    prompts = setting.prompts
    engine = setting.build(AS_SERVED)
    generate(engine, prompts.exact[0], SkipOptions(Mode.EXACT), effort.num_tokens)  # warms up
    others = {"exact_skip_only": SKIP_ONLY, "exact_policy": DIVERGENCE_POLICY} if setting.is_embedded else {}
    usual = _Turns(report, setting, engine, effort, "exact", others)
    usual.run(prompts.exact)
    copying = _Turns(report, setting, engine, effort, "exact_copy")
    copying.run(prompts.copying, ends_with_answer=True)
    report.add_ratio("exact_vs_served_full_depth", usual.speeds, "exact", "full_depth", "≥ 1.3")
    report.add_ratio("exact_copy_vs_served_full_depth", copying.speeds, "exact_copy", "full_depth", "≥ 1")
    report.add("exact_worst_prompt", [min(*usual.ratios(), *copying.ratios())], "≥ 0.97")
    report.add_ratio("exact_vs_transformers", usual.speeds, "exact", "transformers", "≥ 8")
    report.add_ratio("exact_copy_vs_prompt_lookup", copying.speeds, "exact_copy", "prompt_lookup", "≥ 4")
    for name in others:
        report.add_ratio(f"{name}_vs_served_full_depth", usual.speeds, name, "full_depth")
    _measure_streams(report, setting, engine, effort)
    for kind, turns in {"": usual, "copy_": copying}.items():
        name = f"transformers_prompt_lookup_{kind}vs_transformers"
        report.add_ratio(name, turns.speeds, "prompt_lookup", "transformers")
        turns.add_drafts()
    engine.close()
    drafter = setting.engine.facts.policy(None, Mode.EXACT).name
    report.note(
        f"exact: {len(prompts.exact)} prompts, exact_copy: {len(prompts.copying)} whose answers repeat much of the "
        f"prompt (benchmarks/exact_prompts.py), greedy, {effort.num_tokens} new tokens, or as many as the answer that "
        f"copies has, bf16, one stream; drafts from the text and by {drafter}; spreads are over the prompts. "
        "full_depth is as it is served, with prompt lookup; exact_vs_served_full_depth_N: N streams together, from "
        "when all have their first token to the last"
    )
    if setting.is_embedded:
        report.note(
            "the embedded model's file is 4-bit, which flatters a drafter in INT4: exact_skip_only drafts without"
        )
    report.note(
        f"transformers, same prompts, half as many tokens; assisted: prompt_lookup_num_tokens={_LOOKED_UP_TOKENS}, its "
        "defaults otherwise"
    )


def _measure_streams(report: Report, setting: Setting, engine: Engine, effort: Effort) -> None:
    """Adds EXACT's speed over full depth's where several streams run together."""
    modes = {"full_depth": FULL_DEPTH, "exact": SkipOptions(Mode.EXACT)}
    works = {
        f"{name}_{count}": streaming(
            f"{name}_{count}", EngineContender(engine, skip), setting, count, effort.num_tokens
        )
        for count in _STREAMS
        for name, skip in modes.items()
    }
    values = interleaved(report, "exact: streams", works, effort.rounds)
    for count, target in _STREAMS.items():
        report.add_ratio(f"exact_vs_served_full_depth_{count}", values, f"exact_{count}", f"full_depth_{count}", target)


class _Turns:
    """All contenders over some prompts, in turn at each: full depth, EXACT under `name`, other drafters, and
    transformers without and with its prompt lookup."""

    def __init__(
        self,
        report: Report,
        setting: Setting,
        engine: Engine,
        effort: Effort,
        name: str,
        drafters: Mapping[str, SkipOptions] = MappingProxyType({}),
    ) -> None:
        self._report = report
        self._setting = setting
        self._engine = engine
        self._num_tokens = effort.num_tokens
        self._name = name
        self._modes = {"full_depth": FULL_DEPTH, name: SkipOptions(Mode.EXACT), **drafters}
        self._outputs: dict[str, list[Output]] = {own: [] for own in self._modes}
        self.speeds: dict[str, list[float]] = {}
        """Tokens per second at each prompt, of all contenders that ran at all of them."""

    def run(self, prompts: Sequence[list[int]], ends_with_answer: bool = False) -> None:
        """Runs the prompts, each for the same number of tokens, or only as far as full depth's answer goes."""
        peers: dict[str, list[float]] = {name: [] for name in _ASSISTANCE}
        for number, prompt in enumerate(prompts, start=1):
            progress(f"{self._name}: prompt {number} of {len(prompts)}")
            num_tokens = self._num_tokens
            if ends_with_answer:  # what follows would not copy the prompt
                num_tokens = answer_length(self._engine, prompt, num_tokens)
            for name, skip in self._modes.items():
                self._outputs[name].append(generate(self._engine, prompt, skip, num_tokens))
            for name, options in _ASSISTANCE.items():
                if self._setting.transformers is not None:
                    with self._report.attempt(f"{self._name}, {name}"):
                        run = self._setting.transformers.run([prompt], num_tokens // 2, **options)
                        peers[name].append(run.tokens_per_second)
        self.speeds = peers | {name: [own.tokens_per_second for own in runs] for name, runs in self._outputs.items()}
        self.speeds = {name: own for name, own in self.speeds.items() if len(own) == len(prompts)}

    def ratios(self) -> list[float]:
        """Returns EXACT's speed over full depth's at each prompt."""
        return [own / full for own, full in zip(self.speeds[self._name], self.speeds["full_depth"], strict=True)]

    def add_drafts(self) -> None:
        """Adds the speeds, whether tokens are full depth's, and how drafts fared."""
        for name, speeds in self.speeds.items():
            self._report.add(f"{name}_tokens_per_second_over_{self._name}_prompts", speeds)
        full = self._outputs["full_depth"]
        for name, outputs in self._outputs.items():
            if outputs is full:
                continue
            equal = [own.token_ids == expected.token_ids for own, expected in zip(outputs, full, strict=True)]
            self._report.add(f"{name}_prompts_equal_to_full_depth", [statistics.fmean(equal)])
            _add_drafts(self._report, name, [own.speculation for own in outputs if own.speculation is not None])


_ASSISTANCE: Mapping[str, dict[str, int]] = {
    "transformers": {},
    "prompt_lookup": {"prompt_lookup_num_tokens": _LOOKED_UP_TOKENS},
}


def _add_drafts(report: Report, name: str, drafts: list[SpeculationStatistics]) -> None:
    """Adds rates and times over the prompts that drafted."""
    drafting = [own for own in drafts if own.num_drafted]
    from_model = [own for own in drafting if own.num_drafted > own.num_drafted_from_text]
    from_text = [own for own in drafting if own.num_drafted_from_text]
    report.add(f"{name}_prompts_drafted", [len(drafting) / len(drafts)])
    report.add(f"{name}_drafted_per_verification", [own.num_drafted / own.num_verifications for own in drafting])
    report.add(f"{name}_accepted_per_verification", [own.num_accepted / own.num_verifications for own in drafting])
    report.add(f"{name}_acceptance_rate", [own.num_accepted / own.num_drafted for own in drafting])
    report.add(
        f"{name}_acceptance_rate_of_the_text",
        [own.num_accepted_from_text / own.num_drafted_from_text for own in from_text],
    )
    report.add(f"{name}_share_drafted_from_text", [own.num_drafted_from_text / own.num_drafted for own in drafting])
    report.add(
        f"{name}_ms_per_token_that_the_model_drafted",
        [own.draft_ns / 1e6 / (own.num_drafted - own.num_drafted_from_text) for own in from_model],
    )
    report.add(f"{name}_ms_per_verification", [own.verification_ns / 1e6 / own.num_verifications for own in drafting])
    report.add(f"{name}_draft_share_of_time", [own.draft_ns / (own.draft_ns + own.verification_ns) for own in drafting])
