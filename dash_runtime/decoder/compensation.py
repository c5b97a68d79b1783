"""What stands in for a skipped layer: the rungs of a ladder from nothing to a linear map.

`identity` passes the hidden state on; `scale` multiplies it by one number per layer (DASH's
compensation); `affine` by one number per channel, and adds one; `low_rank` and `dense` add a linear map of
the hidden state, in the place of the layer's delta. Fitting is `dash_runtime.training`'s business.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from dash_runtime.errors import PolicyFileError


class CompensationKind(StrEnum):
    """The rungs, cheapest first."""

    IDENTITY = "identity"
    SCALE = "scale"
    AFFINE = "affine"
    LOW_RANK = "low_rank"
    DENSE = "dense"


class Compensation(Protocol):
    """Maps the input of a skipped layer to what goes on in the place of its output."""

    @property
    def kind(self) -> CompensationKind:
        """Which rung this is."""

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """`[rows, hidden_size] -> [rows, hidden_size]`."""

    def tensors(self) -> dict[str, Tensor]:
        """What to store, by name; every tensor's first dimension is the layer."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The hidden state goes on as it is."""

    kind = CompensationKind.IDENTITY

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, slots=True)
class Scale:
    """One factor per layer, `[num_layers]`."""

    factors: Tensor
    kind = CompensationKind.SCALE

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden * self.factors[layer]

    def tensors(self) -> dict[str, Tensor]:
        return {"factors": self.factors}


@dataclass(frozen=True, slots=True)
class Affine:
    """A factor and an offset per channel, each `[num_layers, hidden_size]`."""

    factors: Tensor
    offsets: Tensor
    kind = CompensationKind.AFFINE

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return torch.addcmul(self.offsets[layer], hidden, self.factors[layer])

    def tensors(self) -> dict[str, Tensor]:
        return {"factors": self.factors, "offsets": self.offsets}


@dataclass(frozen=True, slots=True)
class LowRank:
    """`hidden + up · (down · hidden) + offset`: `[num_layers, hidden_size, rank]` and its like."""

    down: Tensor
    up: Tensor
    offsets: Tensor
    kind = CompensationKind.LOW_RANK

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        narrow = torch.nn.functional.linear(hidden, self.down[layer])
        return hidden + torch.nn.functional.linear(narrow, self.up[layer], self.offsets[layer])

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up, "offsets": self.offsets}


@dataclass(frozen=True, slots=True)
class Dense:
    """`hidden + map · hidden + offset`, with a `[num_layers, hidden_size, hidden_size]` map."""

    maps: Tensor
    offsets: Tensor
    kind = CompensationKind.DENSE

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden + torch.nn.functional.linear(hidden, self.maps[layer], self.offsets[layer])

    def tensors(self) -> dict[str, Tensor]:
        return {"maps": self.maps, "offsets": self.offsets}


_CLASSES = {rung.kind: rung for rung in (Identity, Scale, Affine, LowRank, Dense)}


def make_compensation(kind: str, tensors: dict[str, Tensor], num_layers: int, hidden_size: int) -> Compensation:
    """The compensation that `tensors()` described.

    Raises:
        PolicyFileError: the kind is unknown, or a tensor is missing or has the wrong shape.
    """
    try:
        rung = _CLASSES[CompensationKind(kind)]
    except ValueError:
        known = ", ".join(CompensationKind)
        raise PolicyFileError(f"compensation {kind!r} is unknown; known: {known}") from None
    try:
        compensation: Compensation = rung(**tensors)
    except TypeError:
        raise PolicyFileError(f"compensation {kind!r} does not take {sorted(tensors)}") from None
    for name, tensor in tensors.items():
        rank = tensors["down"].shape[1] if name == "up" else None
        expected = {
            (CompensationKind.SCALE, "factors"): (num_layers,),
            (CompensationKind.LOW_RANK, "down"): (
                num_layers,
                tensor.shape[min(1, tensor.dim() - 1)],
                hidden_size,
            ),
            (CompensationKind.LOW_RANK, "up"): (num_layers, hidden_size, rank),
            (CompensationKind.DENSE, "maps"): (num_layers, hidden_size, hidden_size),
        }.get((compensation.kind, name), (num_layers, hidden_size))
        if tuple(tensor.shape) != expected:
            raise PolicyFileError(f"compensation tensor {name!r} has shape {tuple(tensor.shape)}, not {expected}")
    return compensation
