"""Decodes tokens as an engine does, without one: an engine brings libraries that a bare machine lacks.

Knows the decoder, policies and a lane; knows no figures.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_once.random_models import drawn_on, some_costs
from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.decider import Decider, plan_of
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.planner import HighestAction
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.kv_cache import CachePool, SequenceCache
from dash_runtime.passes import PassPlan, RowPlan
from dash_runtime.policy.policy import Policy, Token, full_depth

TokenIds = list[int]
"""One per row."""
_PRICE = 1.0


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens, plans and times of some decoded steps. A step makes one token of every row."""

    tokens: list[TokenIds]
    """By step; the most likely ones."""
    plans: list[list[bytes]]
    """By step and row."""
    step_seconds: float
    """Mean over all steps but the first."""
    waited_seconds: float
    """The time that the decoder waited for the policy in the mean step, as the lane says."""


@contextmanager
def contexts(pool: CachePool, lengths: Sequence[int], num_more: int, seed: int = 0) -> Iterator[list[SequenceCache]]:
    """Yields one cache per length, with so many random keys and values in it and room for `num_more`."""
    caches: list[SequenceCache] = []
    try:
        for length in lengths:
            cache = pool.reserve(length + num_more)
            assert cache is not None, "the pool is too small"
            caches.append(cache)
            device = pool.memories[0].device
            made_on = drawn_on(device)
            generator = torch.Generator(made_on).manual_seed(seed + len(caches))
            copied = []
            for memory in cache.memories:
                shape, dtype = memory[:, :, :length].shape, memory.dtype
                copied.append(torch.randn(shape, generator=generator, device=made_on, dtype=dtype).to(device))
            cache.append(copied)
        yield caches
    finally:
        for cache in caches:
            pool.release(cache)


@contextmanager
def rolled_back(caches: Sequence[SequenceCache]) -> Iterator[None]:
    """Forgets afterwards what was cached inside."""
    lengths = [cache.length for cache in caches]
    try:
        yield
    finally:
        for cache, length in zip(caches, lengths, strict=True):
            cache.truncate(length)


@contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """Makes whatever lets the host wait for a CUDA device raise RuntimeError; waiting for events is no error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def prefill(decoder: Decoder, cache: SequenceCache, token_ids: Sequence[int]) -> int:
    """Runs a prompt at full depth; returns the most likely next token."""
    batch = decoder.batch(PassKind.PREFILL, [cache], [len(token_ids)], [full_depth(decoder.num_layers).compensation])
    hidden = decoder.run_pass(PassPlan.of((Action.FULL,) * decoder.num_layers), token_ids, batch).states
    batch.commit()
    assert hidden is not None
    return int(decoder.logits(hidden[-1:], (Action.FULL,)).argmax())


@torch.inference_mode()
def generate(
    decoder: Decoder,
    lane: Lane,
    policy: Policy,
    caches: Sequence[SequenceCache],
    first_ids: TokenIds,
    num_steps: int,
    *,
    forced: Sequence[TokenIds] | None = None,
    replayed: Sequence[Sequence[bytes]] | None = None,
    on_logits: Callable[[Tensor], None] = lambda logits: None,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Run:
    """Decodes one token of every row in each step, and forgets them afterwards.

    Args:
        forced: the tokens that go on instead of the most likely ones, by step.
        replayed: plans to run instead of asking the policy, by step and row.
        on_logits: is called with each step's float32 `[rows, vocab_size]`.
        guard: is around each step's pass and head.
    """
    num_rows, costs = len(caches), some_costs(decoder.num_layers)
    token_ids, run = first_ids, Run([], [], 0.0, 0.0)
    planner = HighestAction() if num_rows > 1 else None  # as where the device has graphs, so that plans compare
    times, waited = [], lane.exposed_ns
    with rolled_back(caches):
        for step in range(num_steps):
            batch = decoder.batch(
                PassKind.DECODE, caches, [1] * num_rows, [policy.compensation] * num_rows, [policy.kv_action] * num_rows
            )
            tokens = [Token(row, cache.length, _PRICE) for row, cache in enumerate(caches)]
            plan = plan_of([Decider(policy, lane, range(num_rows), tokens, costs, num_rows)], planner)
            plan = replace(plan, heads=())
            if replayed is not None:
                rows = [RowPlan(dict(enumerate(map(Action, own)))) for own in replayed[step]]
                plan = PassPlan(rows)
            with guard():
                output = decoder.run_pass(plan, token_ids, batch)
                assert output.states is not None
                logits = decoder.logits(output.states, [policy.head] * num_rows)
            batch.commit()
            on_logits(logits)
            run.tokens.append(logits.argmax(-1).tolist())
            times.append(time.perf_counter())  # the tokens are on the host, so the device is idle
            run.plans.append(output.plans)
            token_ids = run.tokens[-1] if forced is None else forced[step]
    mean_seconds = (times[-1] - times[0]) / max(1, num_steps - 1)
    return Run(run.tokens, run.plans, mean_seconds, (lane.exposed_ns - waited) / 1e9 / num_steps)


def action_shares(plans: Sequence[Sequence[bytes]]) -> Mapping[str, float]:
    """Returns the share of layers that ran each action."""
    ran = b"".join(plan for step in plans for plan in step)
    return {action.name: ran.count(action) / len(ran) for action in Action}
