"""`python -m benchmarks.gpu`: measures in one run what needs a CUDA device: parity, speed, overlap, memory.

Prints the figures and keeps them in `benchmarks/results/gpu.json`. Exits with 1 if tokens differ that must be equal,
and with 2 without a CUDA device. The same functions run on a CPU, with its lanes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from benchmarks.figures import Figure, machine
from dash_runtime.actions import Action
from dash_runtime.checkpoints import EMBEDDED, default_cache_folder, resolve_checkpoint
from dash_runtime.config import EngineConfig, GenerationRequest, LaneKind, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.events import SequenceFinished, TokenProduced
from dash_runtime.policy.catalog import FRONTIER
from dash_runtime.startup.build import DTYPES, BuildOptions, build_engine

RESULTS_FILE = Path(__file__).parent / "results" / "gpu.json"
PARITY_TOKENS = 64
BATCH_SIZES = (1, 16)
PROMPTS = (
    "<|im_start|>user\nTell me how bread is made, from the field to the oven.<|im_end|>\n<|im_start|>assistant\n",
    "The capital of France is",
    "def fibonacci(n):\n    ",
)
FULL_DEPTH = SkipOptions(Mode.FULL_DEPTH)
NOTES = (
    "equal tokens in bf16 may end at a near-tie, as two implementations round differently",
    "exposed: inline all of the evaluation and the wait for what the device does before it; elsewhere the wait for the "
    "decision, not the host's time to queue the work; overlap is 1 − exposed ÷ inline's, speed_vs_inline its effect",
    "peak memory is what torch allocated for one engine and its cache, without the CUDA context",
)

Engines = dict[LaneKind, Engine]
Tokens = list[list[int]]


@dataclass(frozen=True, slots=True)
class Run:
    tokens: Tokens
    step_seconds: float  # mean time of a step, which produces one token of every sequence
    exposed_seconds: float  # the part of it that the decoder lost to the policy


def adaptive(engine: Engine) -> SkipOptions:
    """Returns the first policy at its recommended budget, by name: else a fixed plan may run, which decides nothing."""
    learned = (policy.name for policy in engine.facts.policies if policy.learned and policy.name != FRONTIER)
    return SkipOptions(Mode.ADAPTIVE, policy_name=next(learned, None))


def build(
    folder: Path, cache_folder: Path, device: str, precision: str, lane: LaneKind, policy_file: Path | None = None
) -> Engine:
    """Builds an engine that prefills all prompts in one step, so that all sequences decode in the same steps."""
    config = EngineConfig(num_slots=max(BATCH_SIZES), prefill_chunk_tokens=4096, lane=lane)
    # Compared engines must plan alike.
    options = BuildOptions([device], precision=precision, checks_kept_costs=False, policy_file=policy_file)
    return build_engine(folder, cache_folder, options, config, print)


def generate(engine: Engine, prompts: Tokens, num_tokens: int, skip: SkipOptions) -> Run:
    """Generates for all prompts at once, greedily and past any end of sequence."""
    stopping = StoppingParameters(num_tokens, ignore_eos=True)
    outputs: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    for request_id, prompt in zip(outputs, prompts, strict=True):
        engine.submit(GenerationRequest(request_id, prompt, stopping, skip=skip))
    times: list[float] = []
    exposed = 0.0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenProduced):
                outputs[event.request_id].append(event.token_id)
            elif isinstance(event, SequenceFinished):
                exposed = event.depth.mean_exposed_seconds  # the same for all sequences: their steps are common
        times.append(time.perf_counter())  # the tokens are on the host, so the device is idle
    if len(times) != num_tokens:
        raise RuntimeError(f"the sequences did not decode together: {len(times)} steps for {num_tokens} tokens each")
    return Run(list(outputs.values()), (times[-1] - times[0]) / (num_tokens - 1), exposed)


def tokens_alone(engine: Engine, prompts: Tokens, num_tokens: int, skip: SkipOptions) -> Tokens:
    """Returns the tokens of each prompt on its own; a batch may round differently."""
    return [generate(engine, [prompt], num_tokens, skip).tokens[0] for prompt in prompts]


def tokens_of_transformers(folder: Path, device: str, precision: str, prompts: Tokens, num_tokens: int) -> Tokens:
    """Returns the tokens that transformers generates for the same prompts."""
    from transformers import AutoModelForCausalLM

    model = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])).to(device)
    options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens: list[list[int]] = []
    for prompt in prompts:
        inputs = torch.tensor([prompt], device=device)
        generated = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        tokens.append(generated[0, len(prompt) :].tolist())
    return tokens


def equal_tokens(expected: Tokens, actual: Tokens) -> list[int]:
    """Returns, for each prompt, the number of equal tokens before the first difference."""
    pairs = (zip(left, right, strict=True) for left, right in zip(expected, actual, strict=True))
    return [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], own)) for own in pairs]


def device_parity(folder: Path, cache_folder: Path, device: str, prompts: Tokens) -> Figure:
    """Compares FULL_DEPTH in float32 with the CPU, whose tokens the tests compare with transformers."""
    engines = [build(folder, cache_folder, place, "float32", LaneKind.INLINE) for place in ("cpu", device)]
    counts = equal_tokens(*(tokens_alone(engine, prompts, PARITY_TOKENS, FULL_DEPTH) for engine in engines))
    return Figure.of("fp32_cpu_vs_device_equal_tokens", [min(counts)], f"≥ {PARITY_TOKENS}")


def lane_parity(engines: Engines, prompts: Tokens) -> Iterator[Figure]:
    """Compares ADAPTIVE on every other lane with the inline lane."""
    inline, *others = (tokens_alone(engine, prompts, PARITY_TOKENS, adaptive(engine)) for engine in engines.values())
    for lane, own in zip(list(engines)[1:], others, strict=True):
        yield Figure.of(f"{lane}_vs_inline_equal_tokens", [min(equal_tokens(inline, own))], f"≥ {PARITY_TOKENS}")


def speeds(engines: Engines, prompts: Tokens, num_tokens: int, rounds: int) -> Iterator[Figure]:
    """Yields the speed of every mode and lane, and the policy's cost on each lane. Ratios are taken within a round."""
    inline = engines[LaneKind.INLINE]  # it adds least where no network is evaluated
    fixed = [action for action in inline.facts.actions if action in (Action.INT8, Action.INT4)]
    contenders = {"full_depth": (inline, FULL_DEPTH)}
    contenders |= {action.name.lower(): (inline, SkipOptions(Mode.FIXED, fixed_action=action)) for action in fixed}
    contenders |= {f"adaptive_{lane}": (engine, adaptive(engine)) for lane, engine in engines.items()}
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, (engine, skip) in contenders.items():
            runs[name].append(generate(engine, prompts, num_tokens, skip))
    runs = {name: own[1:] for name, own in runs.items()}  # the first round warms up
    batch = f"batch{len(prompts)}"
    for name, own in runs.items():
        yield Figure.of(f"{batch}_{name}_tokens_per_second", [len(prompts) / run.step_seconds for run in own])
    for lane in engines:
        own = runs[f"adaptive_{lane}"]
        pairs = list(zip(own, runs["adaptive_inline"], strict=True))
        yield Figure.of(f"{batch}_{lane}_exposed_us_per_token", [run.exposed_seconds * 1e6 for run in own])
        yield Figure.of(
            f"{batch}_{lane}_exposed_share_of_token", [run.exposed_seconds / run.step_seconds for run in own]
        )
        yield Figure.of(
            f"{batch}_{lane}_overlap", [1 - run.exposed_seconds / base.exposed_seconds for run, base in pairs]
        )
        yield Figure.of(
            f"{batch}_{lane}_speed_vs_inline", [base.step_seconds / run.step_seconds for run, base in pairs]
        )


def measure_all(folder: Path, cache_folder: Path, device: str, num_tokens: int, rounds: int) -> Iterator[Figure]:
    """Yields every figure as soon as it is measured. Memory and the stream lane need a CUDA `device`."""
    has_cuda = device == "cuda"
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    prompts = [encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]
    batches = [[prompts[place % len(prompts)] for place in range(size)] for size in BATCH_SIZES]
    inline = build(folder, cache_folder, device, "bfloat16", LaneKind.INLINE)
    print(f"actions {[action.name for action in inline.facts.actions]}, {inline.facts.policies[0]}")
    if has_cuda:  # while there is only one engine
        torch.cuda.reset_peak_memory_stats()
        generate(inline, batches[-1], num_tokens, adaptive(inline))
        yield Figure.of("peak_gpu_memory_gb", [torch.cuda.max_memory_allocated() / 1e9])
    expected = tokens_of_transformers(folder, device, "bfloat16", prompts, PARITY_TOKENS)
    own = tokens_alone(inline, prompts, PARITY_TOKENS, FULL_DEPTH)
    yield Figure.of("bf16_transformers_vs_full_depth_equal_tokens", equal_tokens(expected, own))
    yield device_parity(folder, cache_folder, device, prompts)
    engines = {LaneKind.INLINE: inline}
    for lane in (LaneKind.THREAD, LaneKind.CUDA_STREAM) if has_cuda else (LaneKind.THREAD,):
        engines[lane] = build(folder, cache_folder, device, "bfloat16", lane)
    yield from lane_parity(engines, prompts)
    for batch in batches:
        yield from speeds(engines, batch, num_tokens, rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens; wider spread")
    num_tokens, rounds = (32, 3) if parser.parse_args(arguments).quick else (128, 7)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 2
    torch.set_float32_matmul_precision("highest")  # some images allow TF32 by an environment variable
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint(EMBEDDED, None, cache_folder, print)
    notes = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {num_tokens} tokens, {rounds} rounds", *NOTES]
    print(machine(), *(f"- {note}" for note in notes), sep="\n")
    figures: list[Figure] = []
    for figure in measure_all(folder, cache_folder, "cuda", num_tokens, rounds):
        print(figure.line(), flush=True)  # at once, so that a later failure loses nothing
        figures.append(figure)
    content = {"machine": machine(), "notes": notes, "figures": {figure.name: asdict(figure) for figure in figures}}
    RESULTS_FILE.parent.mkdir(exist_ok=True)
    RESULTS_FILE.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(figure.low == PARITY_TOKENS for figure in figures if figure.target) else 1


if __name__ == "__main__":
    sys.exit(main())
