"""Tells how much of a token's time passes in native code: passes with their heads, bursts, and policies.

What is left is Python, torch and sampling. Knows which functions there are; does not know what a mode means.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.contenders import EngineContender
from benchmarks.figures import Report
from benchmarks.rounds import Effort, interleaved, progress
from benchmarks.setting import FULL_DEPTH, INT4, Setting
from dash_runtime.actions import Action
from dash_runtime.config import SkipOptions
from dash_runtime.decoder.backends.native import NativeBackend
from dash_runtime.engine.engine import Engine
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.native.library import NativeLibrary
from dash_runtime.passes import PassPlan
from dash_runtime.startup.measure import filled_caches, timed

_FUNCTIONS = ("run_rows", "run_burst", "choose")
_CONTEXTS = (256, 1500)
_STREAMS = (1, 16)


def measure_split(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds the share of a token that no native function takes, and what the attention of a context takes."""
    library = _library_of(setting.engine)
    if library is None:
        raise RuntimeError("nothing is compiled here")
    modes = {"int4": INT4, "adaptive": setting.adaptive, "full_depth": FULL_DEPTH}
    works = {
        f"{mode}_{count}": partial(_split, setting, library, f"{mode}_{count}", skip, count, effort)
        for mode, skip in modes.items()
        for count in _STREAMS
    }
    values = interleaved(report, "split", works, effort.rounds)
    for name, shares in values.items():
        target = "≤ 0.04" if name.endswith("_1") else ""
        report.add(f"dispatch_share_{name}", shares, target)
    report.note(
        "dispatch_share_MODE_N: the share of the time of N streams' decode steps that passes outside of the native "
        "code of layers, heads, attention and policies: Python, torch's operations, sampling"
    )
    progress("split: attention")
    with report.attempt("split, attention"):
        _measure_attention(report, setting.engine, effort.rounds)


def _library_of(engine: Engine) -> NativeLibrary | None:
    backend = engine._decoder.backends[PassKind.DECODE][0]
    return backend._rows._library if isinstance(backend, NativeBackend) else None


def _split(
    setting: Setting, library: NativeLibrary, name: str, skip: SkipOptions, count: int, effort: Effort
) -> Mapping[str, float]:
    """Returns the share of decoding that is spent outside of native code."""
    num_tokens = effort.num_tokens if count == 1 else effort.stream_tokens
    with _timed_functions(library) as calls:
        started = time.perf_counter()
        run = EngineContender(setting.engine, skip).run(setting.prompts.streams(count), num_tokens)
    native = sum(seconds for began, seconds in calls if began >= started + run.seconds_to_first)
    return {name: 1 - native / run.seconds}


@contextmanager
def _timed_functions(library: NativeLibrary) -> Iterator[list[tuple[float, float]]]:
    """Collects when each call of native code began, and how long it took."""
    calls: list[tuple[float, float]] = []
    plain = {name: getattr(library, name) for name in _FUNCTIONS}

    def timed_call(name: str, *arguments: object) -> object:
        began = time.perf_counter()
        result = plain[name](*arguments)
        calls.append((began, time.perf_counter() - began))
        return result

    for name in _FUNCTIONS:
        setattr(library, name, partial(timed_call, name))
    try:
        yield calls
    finally:
        for name, function in plain.items():
            setattr(library, name, function)


@torch.inference_mode()
def _measure_attention(report: Report, engine: Engine, rounds: int) -> None:
    """Adds the seconds that a context costs a token: all layers in FULL behind it, less those behind a single token."""
    decoder = engine._decoder
    plan = PassPlan.of((Action.FULL,) * decoder.num_layers)
    batches: dict[int, Batch] = {}
    for length in (1, *_CONTEXTS):
        batches[length] = decoder.batch(PassKind.DECODE, filled_caches(decoder, num_tokens=length), [1], [Identity()])

    def run_layers(batch: Batch) -> None:
        decoder.run_pass(plan, [0], batch)

    seconds = [
        {length: timed(decoder, partial(run_layers, batch)) for length, batch in batches.items()}
        for _ in range(10 * rounds + 1)
    ][1:]
    for length in _CONTEXTS:
        report.add(f"split_attention_{length}_seconds", [own[length] - own[1] for own in seconds])
    report.note(
        f"split_attention_N: what all {decoder.num_layers} layers in FULL take longer for a token behind N others than "
        f"for one behind a single one, {len(seconds)} rounds"
    )
