"""Decode speed at batch 1: transformers' `generate` beside our engine, interleaved in one process.

Every contender gets the same prompt, the same threads and the same number of new tokens, greedily; a round runs each
once, and ratios are taken within a round, so that a drifting clock cancels out.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.figures import Figure
from dash_runtime.actions import Action
from dash_runtime.checkpoints import resolve_checkpoint
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.build import BuildOptions, build_engine
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.sequence import TokenProduced

PROMPT = "<|im_start|>user\nTell me how bread is made, from the field to the oven.<|im_end|>\n<|im_start|>assistant\n"

Contender = Callable[[], float]
"""Generates, and returns the seconds from the first new token to the last."""

OURS = {
    "full_depth": SkipOptions(Mode.FULL_DEPTH),
    "int8": SkipOptions(Mode.FIXED, fixed_action=Action.INT8),
    "int4": SkipOptions(Mode.FIXED, fixed_action=Action.INT4),
    "random_0.8": SkipOptions(Mode.ADAPTIVE, compute_budget=0.8, policy_name="random"),
    "random_0.5": SkipOptions(Mode.ADAPTIVE, compute_budget=0.5, policy_name="random"),
}


def measure_decode(cache_folder: Path, num_tokens: int, rounds: int) -> tuple[list[Figure], list[str]]:
    """Tokens per second of every contender, and the ratios that are asked for."""
    folder = resolve_checkpoint("embedded", None, cache_folder)
    prompt_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
    engine = build_engine(folder, cache_folder, BuildOptions(), EngineConfig(), lambda _: None)
    contenders: dict[str, Contender] = {"transformers": _transformers(folder, prompt_ids, num_tokens)}
    for name, skip in OURS.items():
        contenders[name] = _ours(engine, prompt_ids, num_tokens, skip)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender())
    num_decoded = num_tokens - 1
    figures = [
        Figure.of(f"{name}_tokens_per_second", [num_decoded / own for own in taken]) for name, taken in seconds.items()
    ]
    figures += [
        _ratio("full_depth_vs_transformers", seconds, "transformers", "full_depth", "≥ 1.5"),
        _ratio("int4_vs_full_depth", seconds, "full_depth", "int4", "≥ 2.2"),
        *(_ratio(f"{name}_vs_full_depth", seconds, "full_depth", name, None) for name in ("random_0.8", "random_0.5")),
    ]
    costs = [f"{action.name} {cost:.3f}" for action, cost in engine.facts.policies[0].action_costs.items()]
    notes = [
        f"decode: batch 1, greedy, {len(prompt_ids)} prompt tokens, {num_tokens} new tokens, first to last, "
        f"{rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}; int8 and int4 with INT8 head; "
        "random is the random policy at that compute budget",
        "the embedded model's own weights are 4-bit, so INT4 is nearly free of error on it: its speed carries over, "
        "its quality does not",
        f"cost of an action as a share of a full layer, as measured here: {', '.join(costs)}",
        f"median seconds per token, full depth: {statistics.median(seconds['full_depth']) / num_decoded:.4f}",
    ]
    return figures, notes


def _ratio(name: str, seconds: dict[str, list[float]], slow: str, fast: str, target: str | None) -> Figure:
    return Figure.of(name, [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)], target)


def _transformers(folder: Path, prompt_ids: list[int], num_tokens: int) -> Contender:
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class TokenTimes(StoppingCriteria):  # type: ignore[misc]
        """Stops nothing; is called after every new token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    inputs = torch.tensor([prompt_ids])
    mask = torch.ones_like(inputs)

    def run() -> float:
        token_times = TokenTimes()
        with torch.inference_mode():
            model.generate(
                inputs,
                attention_mask=mask,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([token_times]),
            )
        return token_times.times[-1] - token_times.times[0]

    return run


def _ours(engine: Engine, prompt_ids: list[int], num_tokens: int, skip: SkipOptions) -> Contender:
    request = GenerationRequest("bench", prompt_ids, StoppingParameters(num_tokens, ignore_eos=True), skip=skip)

    def run() -> float:
        engine.submit(request)
        times: list[float] = []
        while engine.has_work:
            events = engine.step()
            times += [time.perf_counter() for event in events if isinstance(event, TokenProduced)]
        return times[-1] - times[0]

    return run
