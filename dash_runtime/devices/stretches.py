"""Stretches of layers: a model that is larger than a device lies on several, some consecutive layers on each.

Knows devices and numbers of layers; knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive layers on one device."""

    device: torch.device
    layers: range


def stretches_of(devices: Sequence[torch.device]) -> list[Stretch]:
    """Returns the stretches of a model with these devices, one per layer."""
    stretches: list[Stretch] = []
    for device, own in groupby(range(len(devices)), key=devices.__getitem__):
        first, *others = own
        stretches.append(Stretch(device, range(first, first + 1 + len(others))))
    return stretches
