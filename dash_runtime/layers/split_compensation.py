"""Compensation of layers that lie on several devices. Knows compensations and devices; knows no rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.devices import stretches_of
from dash_runtime.layers.compensation import Compensation, CompensationKind


@dataclass(frozen=True, slots=True)
class SplitCompensation(Compensation):
    """A compensation in parts: one for each stretch of layers, on its device."""

    parts: Sequence[Compensation]
    places: Sequence[tuple[int, int]]
    """By layer: its part, and its place among the part's layers."""

    @property
    def kind(self) -> CompensationKind:
        return self.parts[0].kind

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        part, place = self.places[layer]
        return self.parts[part](place, hidden)

    def tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError("a compensation is stored before it is split")


def compensation_over(compensation: Compensation, devices: Sequence[torch.device]) -> Compensation:
    """Returns the same compensation with each layer's tensors on its device; `devices` has one per layer."""
    stretches, tensors = stretches_of(devices), compensation.tensors()
    if len(stretches) == 1 or not tensors:
        return compensation
    parts = [
        type(compensation)(*(tensor[own.layers.start : own.layers.stop].to(own.device) for tensor in tensors.values()))
        for own in stretches
    ]
    places = [(part, place) for part, own in enumerate(stretches) for place in range(len(own.layers))]
    return SplitCompensation(parts, places)
