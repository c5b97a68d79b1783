"""Splits a token's time by torch's profiler: products, attention, pointwise work, policy, sampling, dispatch.

Counts each operation's own time in the engine's thread; time between operations is dispatch. Knows the names of
operations; does not know what a mode means.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.figures import Report
from benchmarks.rounds import Effort, progress
from benchmarks.setting import FULL_DEPTH, Setting
from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import Lane, Ticket
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.policy import Decision, Policy, State
from dash_runtime.programs.program_cache import Program
from dash_runtime.startup.measure import filled_caches, timed

_STEP, _POLICY, _PROGRAM = "bench::step", "bench::policy", "bench::program"
_PREFIXES = {
    "policy": (_POLICY,),
    "compiled_layers": (_PROGRAM,),
    "sampling": ("aten::argmax", "aten::multinomial", "aten::topk"),
    "attention": ("aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::_flash_attention"),
    "gemm": (
        "aten::linear", "aten::matmul", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear",
        "aten::_weight_int", "mkldnn::",
    ),
}  # fmt: skip
_MOVES_NOTHING = (
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::slice", "aten::select", "aten::split", "aten::chunk",
    "aten::narrow", "aten::expand", "aten::transpose", "aten::permute", "aten::t", "aten::unsqueeze", "aten::squeeze",
    "aten::as_strided", "aten::alias", "aten::detach", "aten::empty", "aten::new_empty", "aten::resize",
    "aten::lift_fresh", "aten::is_nonzero", "aten::item", "aten::_local_scalar_dense", "aten::unbind",
)  # fmt: skip
_CONTEXTS = (256, 1500)
CLASSES = ("gemm", "attention", "pointwise", "compiled_layers", "policy", "sampling", "dispatch")


def measure_split(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds seconds per token of each class, ADAPTIVE and at full depth."""
    for prefix, name, skip in (("", "ADAPTIVE", setting.adaptive), ("full_depth_", "FULL_DEPTH", FULL_DEPTH)):
        progress(f"split: {name}")
        with report.attempt(f"split, {name}"):
            tokens = _profiled_tokens(setting.engine, setting.prompts.single, skip, effort.profiled_tokens)
            for kind in CLASSES:
                report.add(f"split_{prefix}{kind}_seconds", [token[kind] for token in tokens])
            report.add(f"split_{prefix}profiled_token_seconds", [sum(token.values()) for token in tokens])
    with report.attempt("split, attention"):
        _measure_attention(report, setting.engine, effort.rounds)
    report.note(
        f"split_*: {effort.profiled_tokens} tokens of one stream under torch.profiler, ADAPTIVE and (full_depth) "
        "FULL_DEPTH; the profiler inflates all of it, many small operations most: compare profiled_token with the "
        "time that the same mode's tokens per second stand for. A compiled layer is one operation, of the class "
        "compiled_layers. dispatch is Python, operations that move nothing, and what lies between operations"
    )


def _profiled_tokens(engine: Engine, prompt: list[int], skip: SkipOptions, num_tokens: int) -> list[dict[str, float]]:
    """Returns seconds by class, for each token."""
    stopping = StoppingParameters(num_tokens + 3, ignore_eos=True)
    engine.submit(GenerationRequest("split", prompt, stopping, skip=skip))
    try:
        with _marked(engine):
            for _ in range(2):  # the prefill, and one token to warm up
                engine.step()
            # Starting the profiler takes time, which must not count for the first step.
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                time.sleep(0.05)
                for _ in range(num_tokens):
                    with record_function(_STEP):
                        engine.step()
    finally:
        engine.cancel("split")
    steps: dict[int, dict[str, float]] = {}
    for event in profiler.events():
        path = _path(event)
        if path[0].name == _STEP:
            step = steps.setdefault(id(path[0]), dict.fromkeys(CLASSES, 0.0))
            step[_kind([own.name for own in path[1:]])] += event.self_cpu_time_total / 1e6
    if len(steps) != num_tokens:
        raise RuntimeError(f"the profiler saw {len(steps)} of {num_tokens} steps")
    return list(steps.values())


def _path(event: Any) -> list[Any]:
    """Returns the event and those that contain it, outermost first."""
    path = [event]
    while path[-1].cpu_parent is not None:
        path.append(path[-1].cpu_parent)
    return path[::-1]


def _kind(names: list[str]) -> str:
    """Returns the class of an operation, by the names that contain it, outermost first, and its own name."""
    for name in names:
        for kind, prefixes in _PREFIXES.items():
            if name.startswith(prefixes):
                return kind
    if not names or names[-1].startswith(_MOVES_NOTHING) or not names[-1].startswith("aten::"):
        return "dispatch"
    return "pointwise"


@torch.inference_mode()
def _measure_attention(report: Report, engine: Engine, rounds: int) -> None:
    """Adds the seconds that a context costs a token: all layers in FULL behind it, less those behind a single token."""
    decoder = engine._decoder
    hidden, actions = decoder.embed([0]), (Action.FULL,)
    batches: dict[int, Batch] = {}
    for length in (1, *_CONTEXTS):
        batches[length] = decoder.batch(PassKind.DECODE, filled_caches(decoder, num_tokens=length), [1], [Identity()])

    def run_layers(batch: Batch) -> None:
        for layer in range(decoder.num_layers):
            decoder.run_layer(layer, actions, hidden, batch)

    seconds = [
        {length: timed(decoder, partial(run_layers, batch)) for length, batch in batches.items()}
        for _ in range(10 * rounds + 1)
    ][1:]
    for length in _CONTEXTS:
        report.add(f"split_attention_{length}_seconds", [own[length] - own[1] for own in seconds])
    report.note(
        f"split_attention_N: a compiled layer does not show its parts; this is what all {decoder.num_layers} layers in "
        f"FULL take longer for a token behind N others than for one behind a single one, {len(seconds)} rounds"
    )


class _MarkedLane:
    """A lane that marks policy evaluation for the profiler."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def exposed_ns(self) -> int:
        return self._lane.exposed_ns

    @exposed_ns.setter
    def exposed_ns(self, value: int) -> None:
        self._lane.exposed_ns = value

    def submit(self, policy: Policy, layer: int, state: State) -> Ticket:
        with record_function(_POLICY):
            return self._lane.submit(policy, layer, state)

    def result(self, ticket: Ticket) -> Decision:
        with record_function(_POLICY):
            return self._lane.result(ticket)

    def close(self) -> None:
        self._lane.close()


@contextmanager
def _marked(engine: Engine) -> Iterator[None]:
    """Marks policies and compiled programs, which the profiler would not tell apart or not see."""
    lane, call = engine._lane, Program.__call__

    def marked_call(program: Program, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with record_function(_PROGRAM):
            return call(program, inputs)

    replaced: list[tuple[object, str, object, object]] = [
        (engine, "_lane", _MarkedLane(lane), lane),
        (Program, "__call__", marked_call, call),
    ]
    for owner, name, marked, _ in replaced:
        setattr(owner, name, marked)
    try:
        yield
    finally:
        for owner, name, _, plain in replaced:
            setattr(owner, name, plain)
