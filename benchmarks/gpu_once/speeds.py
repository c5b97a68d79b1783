"""Tokens per second of every mode beside the whole step's graph and the eager way; and what a policy exposes."""

import time
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from benchmarks.gpu_once.decoding import Run, TokenIds, action_shares, contexts, generate
from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.model import LOOKAHEADS, Model
from benchmarks.gpu_once.parity import LOGITS_BOUND, relative_error
from benchmarks.gpu_once.whole_step import WholeStep, as_it_is
from benchmarks.rounds import Work, interleaved
from dash_runtime.actions import Action
from dash_runtime.config import LaneKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import device_of
from dash_runtime.engine.lanes import Lane
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.policy.policy import Policy

CONTEXT = 256


def measure_speeds(report: LiveReport, model: Model, num_rows: int, num_tokens: int, rounds: int) -> None:
    """Adds tokens per second of all modes, the eager way's and the whole step's, in interleaved rounds."""
    lane = model.lane(model.concurrent_lane_kind)
    learned = zip(LOOKAHEADS, model.policies, strict=True)
    modes: dict[str, tuple[Decoder, Policy]] = {
        "full": (model.decoder, model.fixed(Action.FULL)),
        **{
            action.name.lower(): (model.decoder, model.fixed(action))
            for action in model.decoder.actions
            if action is not Action.FULL
        },
        **{f"adaptive_lookahead{lookahead}": (model.decoder, policy) for lookahead, policy in learned},
        "eager_full": (model.eager, model.fixed(Action.FULL)),
    }
    first_ids = [row + 1 for row in range(num_rows)]
    with contexts(model.pool, [CONTEXT] * num_rows, num_tokens + 1) as caches:
        works: dict[str, Work] = {
            name: partial(_decode, name, decoder, lane, policy, caches, first_ids, num_tokens)
            for name, (decoder, policy) in modes.items()
        }
        prefix, what = f"{model.name}_rows{num_rows}", f"{model.name}, {num_rows} rows"
        with report.attempt(f"{what}: the whole step's graph"):
            whole = _whole_step(model, caches, num_tokens)
            works["whole_step_full"] = partial(_run_whole, whole, first_ids, num_tokens)
            report.add(
                f"{prefix}_whole_step_logits_error", [_whole_step_error(model, whole, lane, caches)], LOGITS_BOUND
            )
        values = interleaved(report, what, works, rounds, report.has_time)
        lane.close()
        for name in works:
            report.add(f"{prefix}_{name}_tokens_per_second", values.get(name, []))
        report.add_ratio(f"{prefix}_full_vs_whole_step", values, "full", "whole_step_full", "≥ 0.9")
        report.add_ratio(f"{prefix}_full_vs_eager", values, "full", "eager_full")
        if num_rows == 1:
            _note_plans(report, model, caches, first_ids)


def measure_exposed(report: LiveReport, model: Model, num_rows: int, num_tokens: int, rounds: int) -> None:
    """Adds the time that a step takes longer with a policy than with the same plan and none, on both lanes."""
    report.note(
        "exposed: the time of a step, which makes one token of each row, less that of the same plan replayed without a "
        "policy; waited: what the lane counts, which leaves out the host's time to queue"
    )
    first_ids = [row + 1 for row in range(num_rows)]
    lanes = {kind.value: model.lane(kind) for kind in (model.concurrent_lane_kind, LaneKind.INLINE)}
    for lookahead, policy in zip(LOOKAHEADS, model.policies, strict=True):
        prefix = f"{model.name}_rows{num_rows}_lookahead{lookahead}"
        with contexts(model.pool, [CONTEXT] * num_rows, num_tokens + 1) as caches:
            decode = partial(generate, model.decoder, policy=policy, caches=caches, first_ids=first_ids)
            planned = decode(lane=lanes["inline"], num_steps=num_tokens)

            decode = partial(decode, num_steps=num_tokens, forced=planned.tokens)
            works: dict[str, Work] = {
                name: partial(_step_times, name, partial(decode, lane=lane)) for name, lane in lanes.items()
            }
            replay = partial(decode, lane=lanes["inline"], replayed=planned.plans)
            works["no_policy"] = partial(_step_times, "no_policy", replay)
            values = interleaved(report, prefix, works, rounds, report.has_time)
        report.add(f"{prefix}_no_policy_step_us", values.get("no_policy", []))
        for name in lanes:
            if name in values and "no_policy" in values:
                pairs = list(zip(values[name], values["no_policy"], strict=True))
                target = "≤ 0.05" if name == LaneKind.CUDA_STREAM and model.name == "8b" else None
                report.add(f"{prefix}_{name}_exposed_us", [own - base for own, base in pairs])
                report.add(f"{prefix}_{name}_exposed_share", [(own - base) / own for own, base in pairs], target)
                report.add(f"{prefix}_{name}_waited_us", values[f"{name}_waited"])
    for lane in lanes.values():
        lane.close()


def _step_times(name: str, decode: Callable[[], Run]) -> Mapping[str, float]:
    run = decode()
    return {name: run.step_seconds * 1e6, f"{name}_waited": run.waited_seconds * 1e6}


def _whole_step(model: Model, caches: list[SequenceCache], num_tokens: int) -> WholeStep:
    embedding = model.weights["model.embed_tokens.weight"].to(model.device)
    capture = device_of(model.device).make_capture() if model.device.type == "cuda" else as_it_is
    return WholeStep(model.decoder, embedding, caches, num_tokens + 1, capture)


def _whole_step_error(model: Model, whole: WholeStep, lane: Lane, caches: list[SequenceCache]) -> float:
    """Returns the error of its first step's logits beside the eager way's."""
    first_ids = [row + 1 for row in range(len(caches))]
    logits: list[Tensor] = []
    generate(model.eager, lane, model.fixed(Action.FULL), caches, first_ids, 1, on_logits=logits.append)
    whole.run(first_ids, 1)
    return relative_error(logits[0], whole.logits)


def _run_whole(whole: WholeStep, first_ids: TokenIds, num_tokens: int) -> Mapping[str, float]:
    started = time.perf_counter()
    whole.run(first_ids, num_tokens)
    return {"whole_step_full": len(first_ids) * num_tokens / (time.perf_counter() - started)}


def _decode(
    name: str,
    decoder: Decoder,
    lane: Lane,
    policy: Policy,
    caches: list[SequenceCache],
    first_ids: TokenIds,
    num_tokens: int,
) -> Mapping[str, float]:
    run = generate(decoder, lane, policy, caches, first_ids, num_tokens)
    return {name: len(first_ids) / run.step_seconds}


def _note_plans(report: LiveReport, model: Model, caches: list[SequenceCache], first_ids: TokenIds) -> None:
    lane = model.lane(LaneKind.INLINE)
    for policy in model.policies:
        shares = action_shares(generate(model.decoder, lane, policy, caches, first_ids, 8).plans)
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
        report.note(f"{model.name} adaptive: {policy.name}, a network that has learned nothing, took {words}")
