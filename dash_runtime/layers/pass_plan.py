"""A pass from tokens to logits as one call: what decides the layers, and what came of it. Knows no policies."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.rows.policy_rows import PolicyRows


@dataclass(frozen=True, slots=True)
class PassPlan:
    """The pinned layers; and for a single row the policy that decides the others, None if there are none."""

    pinned: Mapping[int, Action]
    policy: PolicyRows | None = None


@dataclass(frozen=True, slots=True)
class PassRun:
    """Float32 logits `[rows, vocab_size]` with each row's likeliest token, and what ran.

    `scores` has those of the layers that were decided, float32 `[num_layers, actions]`; it is empty without a policy.
    `layer_times` are those of `engine.step.StepOutput`.
    """

    logits: Tensor
    likeliest: list[int]
    plan: bytes
    scores: bytes
    layer_times: array
