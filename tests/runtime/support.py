"""Helpers of several runtime tests: decoders, passes over rows, costs, and an engine's events."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.config import GenerationRequest
from dash_runtime.decoder.backends.loop import LoopEnds
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.events import EngineEvent, SequenceFinished, TokenProduced
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Affine, Compensation, Identity, LowRank
from dash_runtime.layers.heads import Heads
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.policy.budgets import BudgetCalibration, PricePoint
from dash_runtime.policy.fixed_plans import MeasuredPlan, named
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec

CPU = torch.device("cpu")
ALL_ACTIONS = tuple(Action)
T = TypeVar("T")


def load_decoder(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    actions: Sequence[Action] = ALL_ACTIONS,
    device: torch.device | Sequence[torch.device] = CPU,
    has_graphs: bool = False,
) -> Decoder:
    config = load_model_config(folder)
    return make_decoder(
        config,
        open_weights(folder),
        tuple(actions),
        dtype=dtype,
        device=device,
        context_length=config.context_length,
        has_graphs=has_graphs,
    )


def loop_ends(decoder: Decoder) -> LoopEnds:
    """Returns what another backend over this decoder's layers needs."""
    return LoopEnds(decoder.num_layers, decoder.embed, Heads(decoder.heads), decoder.placed_on[0])


def new_cache(decoder: Decoder, reserved_tokens: int = 256) -> SequenceCache:
    (cache,) = decoder.caches([reserved_tokens])
    return cache


def run_rows(
    decoder: Decoder,
    caches: Sequence[SequenceCache],
    token_ids: Sequence[Sequence[int]],
    plans: Sequence[Sequence[Action]],
    compensation: Compensation | None = None,
    kv_action: Action = Action.FULL,
) -> Tensor:
    """Runs one pass and returns the logits of all rows. The rows of a sequence share its plan."""
    lengths = [len(ids) for ids in token_ids]
    is_decoding = all(length == 1 and cache.length for cache, length in zip(caches, lengths, strict=True))
    kind = PassKind.DECODE if is_decoding else PassKind.PREFILL
    some = [compensation or Identity()] * len(caches)
    batch = decoder.batch(kind, caches, lengths, some, [kv_action] * len(caches))
    hidden = decoder.embed([token_id for ids in token_ids for token_id in ids])
    for layer in range(decoder.num_layers):
        actions = [plan[layer] for plan, length in zip(plans, lengths, strict=True) for _ in range(length)]
        hidden = decoder.run_layer(layer, actions, hidden, batch)
    batch.commit()
    return decoder.logits(hidden, [Action.FULL] * sum(lengths))


def full_plan(decoder: Decoder) -> tuple[Action, ...]:
    return (Action.FULL,) * decoder.num_layers


def some_affine(decoder: Decoder) -> Affine:
    generator = torch.Generator().manual_seed(1)
    shape = (decoder.num_layers, decoder.config.hidden_size)
    factors = 1 + 0.1 * torch.randn(shape, generator=generator)
    offsets = 0.1 * torch.randn(shape, generator=generator)
    return Affine(factors.to(decoder.dtype), offsets.to(decoder.dtype))


def some_low_rank(decoder: Decoder, rank: int = 4) -> LowRank:
    generator = torch.Generator().manual_seed(3)
    shape = (decoder.num_layers, rank, decoder.config.hidden_size)
    down, up = (0.1 * torch.randn(shape, generator=generator) for _ in range(2))
    offsets = 0.1 * torch.randn(shape[0], shape[2], generator=generator)
    return LowRank(down, up.transpose(1, 2).contiguous(), offsets)


def some_costs(num_layers: int = 6) -> CostTable:
    """Returns a table in which layers cost 10, 35, 40 and 60 % of FULL, and the FULL head as much as two layers."""
    layer = {Action.SKIP: 0.1, Action.INT3: 0.35, Action.INT4: 0.4, Action.INT8: 0.6, Action.FULL: 1.0}
    return CostTable.from_seconds(num_layers, layer, {Action.INT8: 1.0, Action.FULL: 2.0}, 0.2)


def some_network(spec: PlanSpec, hidden_size: int, seed: int = 0, spread: float = 1.0) -> PolicyNetwork:
    """Returns a network that has learned nothing, whose damages differ so much that every action is taken."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(spec.decision_blocks), spec.block_size, len(spec.actions), hidden_size, len(Action), 16, 8)
    tensors = {
        name: torch.randn(shape, generator=generator) * spread for name, shape in PolicyNetwork.shapes(*sizes).items()
    }
    return PolicyNetwork(**tensors)


def some_calibration(spec: PlanSpec, *points: tuple[float, float, float]) -> BudgetCalibration:
    """Returns a calibration of `(budget, log λ, divergence)` at the spec's own costs, all layers in SKIP or FULL."""
    layer, count = spec.costs.layer, spec.num_layers
    rest = spec.costs.token_cost((), spec.head, spec.num_evaluations)

    def point(budget: float, log_price: float, divergence: float) -> PricePoint:
        full = (budget - rest - count * layer[Action.SKIP]) / (layer[Action.FULL] - layer[Action.SKIP])
        return PricePoint(log_price, {Action.SKIP: count - full, Action.FULL: full}, divergence, 0.9)

    return BudgetCalibration(tuple(point(*own) for own in sorted(points, key=lambda own: own[1])))


def some_policy(
    spec: PlanSpec,
    hidden_size: int,
    *points: tuple[float, float, float],
    compensation: Compensation | None = None,
    name: str = "mine",
) -> LearnedPolicy:
    """Returns a policy that has learned nothing, calibrated at `points` as `some_calibration` takes them."""
    return LearnedPolicy(
        name=name,
        network=some_network(spec, hidden_size),
        spec=spec,
        compensation=compensation or Identity(),
        calibration=some_calibration(spec, *points),
    )


def some_plans(num_layers: int = 6) -> tuple[MeasuredPlan, ...]:
    """Returns plans down to skipping all but the edges, which diverge the more the cheaper they are."""
    skips = (Action.FULL, *[Action.SKIP] * (num_layers - 2), Action.FULL)
    half = tuple(Action.SKIP if layer % 2 else Action.INT4 for layer in range(num_layers))
    kernels = ((Action.INT4, 0.03), (Action.INT8, 0.02))
    uniform = [MeasuredPlan("", (action,) * num_layers, Action.INT8, divergence) for action, divergence in kernels]
    worse = [MeasuredPlan("", skips, Action.INT8, 0.9), MeasuredPlan("", half, Action.INT8, 0.5)]
    return named([*worse, *uniform], some_costs(num_layers))


def policy_arguments(model: Path, text: Path, *, cache: Path | None = None) -> list[str]:
    """Returns the options that most of `dash-policy` needs. The cache is kept beside the text unless it is named."""
    cache = text.parent / "cache" if cache is None else cache
    return ["--model", str(model), "--data", str(text), "--device", "cpu", "--cache-folder", str(cache)]


class AtOnce(Executor):
    """An executor that has done what it is given when it returns: requests then begin in their order."""

    def submit(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def drain(engine: Engine) -> dict[str, list[EngineEvent]]:
    """Steps until nothing is left to do; returns the events by request."""
    events: dict[str, list[EngineEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[EngineEvent]]:
    """Submits the requests, and returns their events once all have ended."""
    for own in requests:
        engine.submit(own)
    return drain(engine)


def run_alone(engine: Engine, request: GenerationRequest) -> tuple[list[EngineEvent], int]:
    """Returns a lone request's events, and the number of steps."""
    engine.submit(request)
    events: list[EngineEvent] = []
    num_steps = 0
    while engine.has_work:
        events += engine.step()
        num_steps += 1
    assert engine.num_reserved_cache_tokens == 0
    return events, num_steps


def produced(events: Sequence[EngineEvent]) -> list[TokenProduced]:
    """Returns the tokens with their plans and log probabilities."""
    return [event for event in events if isinstance(event, TokenProduced)]


def tokens(events: list[EngineEvent]) -> list[int]:
    return [event.token_id for event in produced(events)]


def finished(events: list[EngineEvent]) -> SequenceFinished:
    assert isinstance(events[-1], SequenceFinished)
    return events[-1]


def num_layer_runs(events: list[EngineEvent]) -> int:
    """Returns how many layers ran, for decode tokens and beside them."""
    depth = finished(events).depth
    return sum(depth.action_counts.values()) + sum(depth.speculative_action_counts.values())
