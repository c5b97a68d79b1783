"""Prompts: the time to the first token by length, of many prompts at once, and what a prompt does to its neighbours.

Nothing of a prompt is reused.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy
import torch

from benchmarks.contenders import Contender, EngineContender, prefilling_in
from benchmarks.divergence import divergence, read_answer
from benchmarks.figures import Report
from benchmarks.peers.gguf_formats import name_of
from benchmarks.peers.install import find_peer
from benchmarks.peers.section import start_vllm
from benchmarks.prompts import Prompts
from benchmarks.rounds import Effort, Work, interleaved, progress
from benchmarks.setting import FULL_DEPTH, INT4, LONGEST, PLAIN, Setting
from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.events import TokenProduced

LENGTHS = (50, 200, 500, 1000, 2000, 4000, 8000)
_LONG = 2000
"""Prompts from which on few rounds are run: each takes minutes of all contenders."""
_PEERS = ("transformers", *(name_of("llama_cpp", kind) for kind in ("Q4_0", "Q8_0", "BF16")), "ik_llama_cpp_file")
_MANY, _MANY_TOKENS = 32, 100
_NEIGHBOUR_TOKENS, _USUAL_TOKENS, _STREAM_TOKENS = 2000, 60, 4000
_SCORED_TOKENS = 1000
_QUALITY_TEXTS, _QUALITY_PROMPT, _QUALITY_ANSWER = 6, 400, 64


def measure_first_tokens(report: Report, setting: Setting, effort: Effort, folder: Path) -> None:
    """Adds all of them, beside the peers in `folder`."""
    with report.attempt("first tokens by length"):
        _measure_lengths(report, setting, effort)
    with report.attempt("many prompts"):
        _measure_many(report, setting, effort, folder)
    with report.attempt("a neighbour's prompt"):
        _measure_neighbour(report, setting, effort)
    with report.attempt("scoring"):
        _measure_score(report, setting, effort)
    with report.attempt("quality of prompts in INT8"):
        _measure_quality(report, setting)


def _measure_lengths(report: Report, setting: Setting, effort: Effort) -> None:
    contenders: dict[str, Contender] = {
        "full": setting.ours(FULL_DEPTH),
        "int8": setting.ours(INT4, Action.INT8),
        **{name: own for name, own in setting.rivals.items() if name in _PEERS},
    }
    for length in LENGTHS:
        if length >= min(LONGEST, setting.model.context_length):
            continue
        prompt = setting.prompts.text(length)
        works = {name: partial(_first_token, name, own, prompt) for name, own in contenders.items()}
        rounds = effort.rounds if length < _LONG else 2
        values = interleaved(report, f"a prompt of {length}", works, rounds)
        for name in contenders:
            report.add(f"first_token_seconds_{name}_{length}", values.get(name, []))
    report.note(
        "first_token_seconds_CONTENDER_N: from a prompt of N tokens of plain text to its first new token; ours at full "
        f"depth and with the prompt in INT8, the others as in decoding; from {_LONG} tokens on 2 rounds"
    )


def _first_token(name: str, contender: Contender, prompt: list[int]) -> Mapping[str, float]:
    return {name: contender.run([prompt], 1).seconds_to_first}


def _measure_many(report: Report, setting: Setting, effort: Effort, folder: Path) -> None:
    prompts = [setting.prompts.text(_MANY_TOKENS + 7 * number)[:_MANY_TOKENS] for number in range(_MANY)]
    config = replace(PLAIN, num_slots=_MANY, cache_tokens=_MANY * (_MANY_TOKENS + 1 + 64))
    contender = EngineContender(setting.build(config), FULL_DEPTH)

    def together() -> Mapping[str, float]:
        return {"together": contender.run(prompts, 1).seconds_to_first}

    def one_by_one() -> Mapping[str, float]:
        return {"one_by_one": sum(contender.run([prompt], 1).seconds_to_first for prompt in prompts)}

    works: dict[str, Work] = {"together": together, "one_by_one": one_by_one}
    with ExitStack() as running:
        if (python := find_peer(report, "vllm", folder)) is not None:
            with report.attempt("vllm"):
                progress("many prompts: loading vllm; its first start compiles")
                vllm = start_vllm(running, python, str(setting.folder), _MANY, _MANY_TOKENS + 1)
                works["vllm"] = lambda: {"vllm": vllm.run(prompts, 1).seconds_to_first}
        values = interleaved(report, "many prompts", works, effort.rounds)
    report.add("many_prompts_seconds", values["together"])
    report.add("many_prompts_seconds_vllm", values.get("vllm", []))
    report.add_ratio("many_prompts_vs_one_by_one", values, "together", "one_by_one")
    report.add_ratio("many_prompts_vs_vllm", values, "together", "vllm", "≤ 0.5")
    report.note(
        f"many_prompts_seconds: from {_MANY} prompts of {_MANY_TOKENS} tokens at once to the last one's first token, "
        "at full depth"
    )


def _measure_neighbour(report: Report, setting: Setting, effort: Effort) -> None:
    engine = setting.build(replace(PLAIN, burst_milliseconds=0.0))
    works = {
        name: partial(_gap, name, engine, skip, setting.prompts)
        for name, skip in {"full": FULL_DEPTH, "int4": INT4}.items()
    }
    values = interleaved(report, "a neighbour's prompt", works, effort.rounds)
    for name in works:
        report.add(f"gap_beside_prompt_{name}", values.get(name, []), "≤ 4")
        report.add(f"prompt_beside_stream_seconds_{name}", values.get(f"{name}_prompt", []))
    report.note(
        f"gap_beside_prompt_MODE: the longest time between two tokens of a stream in that mode while a prompt of "
        f"{_NEIGHBOUR_TOKENS} tokens at full depth arrives, ÷ the median of its {_USUAL_TOKENS} tokens before; "
        "prompt_beside_stream_seconds_MODE: until that prompt's first token"
    )


@torch.inference_mode()
def _gap(name: str, engine: Engine, skip: SkipOptions, prompts: Prompts) -> Mapping[str, float]:
    times: dict[str, list[float]] = {"stream": [], "prompt": []}

    def step() -> None:
        for event in engine.step():
            if isinstance(event, TokenProduced):
                times[event.request_id].append(time.perf_counter())

    engine.submit(
        GenerationRequest("stream", prompts.single, StoppingParameters(_STREAM_TOKENS, ignore_eos=True), skip=skip)
    )
    while len(times["stream"]) <= _USUAL_TOKENS:
        step()
    usual = float(median(numpy.diff(times["stream"])))
    asked, count = time.perf_counter(), len(times["stream"])
    engine.submit(GenerationRequest("prompt", prompts.text(_NEIGHBOUR_TOKENS), StoppingParameters(1, ignore_eos=True)))
    while not times["prompt"]:
        step()
    step()
    engine.cancel("stream")
    longest = float(numpy.diff(times["stream"][count - 1 :]).max())
    return {name: longest / usual, f"{name}_prompt": times["prompt"][0] - asked}


def _measure_score(report: Report, setting: Setting, effort: Effort) -> None:
    text = setting.prompts.text(_SCORED_TOKENS + 1)
    works: dict[str, Callable[[], Mapping[str, float]]] = {"ours": partial(_score, setting.engine, text)}
    if setting.transformers is not None:
        works["transformers"] = partial(_score_by_transformers, setting.transformers._model, text)
    values = interleaved(report, "scoring", works, effort.rounds)
    report.add("score_seconds", values["ours"])
    if "transformers" in values:
        report.add_ratio("score_vs_transformers", values, "transformers", "ours", "≥ 1.5")
    report.note(
        f"score_seconds: the log probabilities of {_SCORED_TOKENS} given tokens at full depth; score_vs_transformers: "
        "the time of its forward pass in bf16 and log_softmax of all rows, over ours"
    )


@torch.inference_mode()
def _score(engine: Engine, text: list[int]) -> Mapping[str, float]:
    stopping = StoppingParameters(len(text) - 1, ignore_eos=True)
    started = time.perf_counter()
    engine.submit(GenerationRequest("scored", text[:1], stopping, logprobs=0, scored_token_ids=text[1:]))
    while engine.has_work:
        engine.step()
    return {"ours": time.perf_counter() - started}


@torch.inference_mode()
def _score_by_transformers(model: torch.nn.Module, text: list[int]) -> Mapping[str, float]:
    started = time.perf_counter()
    ids = torch.tensor([text])
    rows = model(ids).logits[0, :-1].float().log_softmax(-1)
    rows.gather(1, ids[0, 1:, None]).tolist()
    return {"transformers": time.perf_counter() - started}


def _measure_quality(report: Report, setting: Setting) -> None:
    """Adds what a prompt in INT8 adds to the divergence of an answer in INT4 and in INT8, read token by token."""
    engine, whole = setting.engine, _QUALITY_PROMPT + _QUALITY_ANSWER
    text = setting.prompts.text(_QUALITY_TEXTS * whole)
    texts = [text[first : first + whole] for first in range(0, len(text), whole)]
    found: dict[str, list[float]] = {}
    for number, ids in enumerate(texts):
        progress(f"quality of prompts in INT8: text {number + 1} of {_QUALITY_TEXTS}")
        own = ids[:_QUALITY_PROMPT], ids[_QUALITY_PROMPT:]
        reference = read_answer(engine, FULL_DEPTH, *own)
        for action in (Action.FULL, Action.INT8):
            with prefilling_in(engine, action):
                rows = read_answer(engine, INT4, *own)
            values = [divergence(*pair) for pair in zip(reference, rows, strict=True)]
            found.setdefault(action.name.lower(), []).append(float(numpy.mean(values)))
    for name, values in found.items():
        report.add_mean(f"divergence_int4_prompt_{name}", values)
    report.add("divergence_of_int8_prompt", [fmean(found["int8"]) - fmean(found["full"])], "≤ 0.003")
    report.note(
        f"divergence_int4_prompt_ACTION: nats a token from full depth of {_QUALITY_TEXTS} continuations of "
        f"{_QUALITY_ANSWER} tokens in INT4 behind a prompt of {_QUALITY_PROMPT} in that action; "
        "divergence_of_int8_prompt: their difference"
    )
