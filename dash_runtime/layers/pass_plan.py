"""A pass through all layers as one call: what decides the layers, and what came of it. Knows no policies."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.evaluation import Evaluation


@dataclass(frozen=True, slots=True)
class PassPlan:
    """The pinned layers; and for a single row the evaluation that decides the others, None if there are none."""

    pinned: Mapping[int, Action]
    evaluation: Evaluation | None = None


@dataclass(frozen=True, slots=True)
class PassRun:
    """The last layer's output `[rows, hidden_size]`, which holds until the next run, and what ran.

    `scores` has each layer's, of the layers that were decided. `layer_times` are those of `engine.step.StepOutput`.
    """

    hidden: Tensor
    plan: bytes
    scores: Mapping[int, bytes]
    layer_times: array
