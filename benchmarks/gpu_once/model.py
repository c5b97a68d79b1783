"""A model to measure: its decoders with graphs and without, its cache, its policies. Knows what fits on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_once.graphs import Captured, decoder_with_graphs, eager_over, prepare
from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.random_models import (
    MAX_CONTEXT,
    SHAPES,
    RandomWeights,
    drawn_on,
    matrix_shapes,
    needed_bytes,
    random_compensation,
    random_policy,
)
from dash_runtime.actions import Action
from dash_runtime.config import LaneKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import device_of
from dash_runtime.engine.lanes import Lane, make_lane
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.kv_cache import CachePool
from dash_runtime.linears.quantization import supported_actions
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import FixedPlan, fixed_action_plan

MAX_ROWS = 32
_LEFT_OUT_FIRST = (Action.INT8, Action.INT4)
LOOKAHEADS = (1, 4)
POLICY_ACTIONS = (Action.SKIP, Action.FULL)
"""Slow kernels of other actions would hide what decisions take."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model in bf16 on the device."""

    name: str
    decoder: Decoder
    """With graphs, where the device has them."""
    eager: Decoder
    """The same layers, run eagerly."""
    weights: RandomWeights
    pool: CachePool
    compensation: Compensation
    policies: tuple[LearnedPolicy, ...]
    """One per lookahead."""
    captured: Captured

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def concurrent_lane_kind(self) -> LaneKind:
        """The lane beside the decoder's: a stream on CUDA; elsewhere there is none."""
        return LaneKind.CUDA_STREAM if self.device.type == "cuda" else LaneKind.INLINE

    def lane(self, kind: LaneKind) -> Lane:
        return make_lane(kind, *self.decoder.placed_on, graphs=self.decoder.graphs)

    def fixed(self, action: Action) -> FixedPlan:
        """Returns the plan of mode FIXED; FULL's is full depth's with this model's compensation."""
        return fixed_action_plan(action, self.config.num_layers, self.compensation, tuple(self.decoder.heads))


def build_model(report: LiveReport, name: str, device: torch.device, cache_tokens: int) -> Model | None:
    """Builds the model of a shape, and captures its graphs.

    Notes what does not fit on the device. Returns None if not even FULL does.
    """
    config = SHAPES[name]
    supported = supported_actions(device, torch.bfloat16, matrix_shapes(config))
    offered = tuple(own for own in supported if own is not Action.INT3)  # which no GPU runs
    if missing := [action.name for action in Action if action not in offered]:
        report.note(f"{name}: the device has no kernel for {', '.join(missing)}")
    actions = fitting_actions(report, name, offered, device_of(device).free_bytes(), cache_tokens)
    if actions is None:
        return None
    weights = RandomWeights(config, torch.bfloat16, drawn_on(device))
    decoder = decoder_with_graphs(config, weights, actions, torch.bfloat16, device, MAX_CONTEXT)
    decoder.synchronise()
    compensation = random_compensation(config, torch.bfloat16, device)
    pool = decoder.pool(cache_tokens, MAX_ROWS)
    policies = tuple(
        random_policy(config, POLICY_ACTIONS, (Action.FULL,), compensation, device, lookahead)
        for lookahead in LOOKAHEADS
    )
    captured = prepare(decoder, pool, compensation, MAX_ROWS)
    return Model(name, decoder, eager_over(decoder), weights, pool, compensation, policies, captured)


def fitting_actions(
    report: LiveReport, name: str, offered: Sequence[Action], free: int | None, cache_tokens: int
) -> Sequence[Action] | None:
    """Returns the actions that fit in `free` bytes together, or None if not even FULL does. Notes what is left out."""
    actions = list(offered)
    for left_out in (None, *_LEFT_OUT_FIRST):
        if left_out in actions:
            actions.remove(left_out)
        needed = needed_bytes(SHAPES[name], actions, cache_tokens)
        if free is None or needed <= free:
            words = "unknown" if free is None else f"{free / 1e9:.1f} GB"
            report.note(f"{name}: needs up to {needed / 1e9:.1f} GB, free {words}")
            return actions
        names = " ".join(action.name for action in actions)
        report.note(f"{name}: {names} would need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
    report.note(f"{name}: left out")
    return None
