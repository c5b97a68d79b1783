"""Replacements of a skipped layer: the rungs of a ladder from nothing to a linear map.

`identity` passes the hidden state on. `scale` multiplies it by one number per layer (DASH's compensation). `affine`
has a factor and an offset per channel. `low_rank` and `dense` add a linear map of the hidden state instead of the
layer's delta. Knows nothing of fitting, which is in `dash_runtime.training`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.devices import device_of
from dash_runtime.errors import PolicyFileError
from dash_runtime.linears.quantization import INT8_INPUT_MULTIPLE, supported_actions


class CompensationKind(StrEnum):
    """The rungs, cheapest first."""

    IDENTITY = "identity"
    SCALE = "scale"
    AFFINE = "affine"
    LOW_RANK = "low_rank"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Compensation:
    """Maps the input of a skipped layer to a replacement of its output. Its fields are tensors."""

    @property
    def kind(self) -> CompensationKind:
        """The rung."""
        raise NotImplementedError

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """`[rows, hidden_size] -> [rows, hidden_size]`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors to store, by name; the first dimension of each is the layer."""
        return {own.name: getattr(self, own.name) for own in fields(self) if own.init}


@dataclass(frozen=True, slots=True)
class Identity(Compensation):
    """Passes the hidden state on unchanged."""

    kind = CompensationKind.IDENTITY

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden


@dataclass(frozen=True, slots=True)
class Scale(Compensation):
    """One factor per layer, `[num_layers]`."""

    factors: Tensor
    kind = CompensationKind.SCALE

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden * self.factors[layer]


@dataclass(frozen=True, slots=True)
class Affine(Compensation):
    """A factor and an offset per channel, each `[num_layers, hidden_size]`."""

    factors: Tensor
    offsets: Tensor
    kind = CompensationKind.AFFINE

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return torch.addcmul(self.offsets[layer], hidden, self.factors[layer])


@dataclass(frozen=True, slots=True)
class LowRank(Compensation):
    """`hidden + up · (down · hidden) + offset`, in float32.

    `down` is `[num_layers, rank, hidden_size]`, `up` `[num_layers, hidden_size, rank]`, `offsets` `[num_layers,
    hidden_size]`. This form is fitted and trained; it also runs where `PackedLowRank` cannot.
    """

    down: Tensor
    up: Tensor
    offsets: Tensor
    kind = CompensationKind.LOW_RANK
    _layers: tuple[tuple[Tensor, Tensor, Tensor], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once and split: indexing, transposing and casting for every token would take as long as the products.
        up = self.up.transpose(-1, -2).contiguous()
        layers = tuple(zip(self.down, up, self.offsets, strict=True))
        object.__setattr__(self, "_layers", layers)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        if 1 < len(hidden) <= device_of(hidden.device).most_rows_apart:
            return torch.cat([self(layer, row) for row in hidden.split(1)])
        down, up, offset = self._layers[layer]
        wide = hidden.float()
        narrow = torch.nn.functional.linear(wide, down)
        return torch.addmm(wide + offset, narrow, up).to(hidden.dtype)

    def to(self, device: torch.device) -> "LowRank":
        """Returns the same map on another device."""
        return LowRank(self.down.to(device), self.up.to(device), self.offsets.to(device))


@dataclass(frozen=True, slots=True)
class PackedLowRank(Compensation):
    """A `LowRank` with INT8 matrices and a scale for each of their rows, run by the kernel of INT8 layers.

    A skip mostly waits for these matrices, and they are most of a policy's file. At a quarter of the bytes the map can
    have twice the rank and still cost half. `down` is int8 `[num_layers, rank, hidden_size]`, `up` `[num_layers,
    hidden_size, rank]`; the rest is in the decoder's dtype.
    """

    down: Tensor
    down_scales: Tensor
    up: Tensor
    up_scales: Tensor
    offsets: Tensor
    kind = CompensationKind.LOW_RANK
    _layers: tuple[tuple[Tensor, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", tuple(zip(*self.tensors().values(), strict=True)))

    @classmethod
    def from_low_rank(cls, low_rank: LowRank, dtype: torch.dtype) -> "PackedLowRank":
        down, down_scales = _pack_rows(low_rank.down, dtype)
        up, up_scales = _pack_rows(low_rank.up, dtype)
        return cls(down, down_scales, up, up_scales, low_rank.offsets.to(dtype))

    def to_low_rank(self) -> LowRank:
        down, up = (
            matrices.float() * scales.float().unsqueeze(-1)
            for matrices, scales in ((self.down, self.down_scales), (self.up, self.up_scales))
        )
        return LowRank(down, up, self.offsets.float())

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        down, down_scales, up, up_scales, offset = self._layers[layer]
        narrow = torch.ops.aten._weight_int8pack_mm(hidden, down, down_scales)
        return (hidden + offset).add_(torch.ops.aten._weight_int8pack_mm(narrow, up, up_scales))


def _pack_rows(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = (matrices.abs().amax(dim=-1).clamp_min(1e-12) / 127).to(dtype)
    rounded = torch.round(matrices / scales.float().unsqueeze(-1)).clamp(-127, 127)
    return rounded.to(torch.int8).contiguous(), scales


def packed(low_rank: LowRank, dtype: torch.dtype) -> "LowRank | PackedLowRank":
    """Returns the form of `low_rank` that a decoder of this dtype serves: packed if a kernel exists, else as it is."""
    rank, hidden_size = low_rank.down.shape[1:]
    fits = rank % INT8_INPUT_MULTIPLE == 0 and hidden_size % INT8_INPUT_MULTIPLE == 0
    is_packable = (
        fits and device_of(low_rank.down.device).has_int8_rows and dtype is torch.bfloat16 and _has_int8_kernel()
    )
    return PackedLowRank.from_low_rank(low_rank, dtype) if is_packable else low_rank


def unpacked(compensation: Compensation) -> Compensation:
    """Returns a packed map with the same values in float32, which is trained and runs many rows; others as they are."""
    return compensation.to_low_rank() if isinstance(compensation, PackedLowRank) else compensation


@lru_cache
def _has_int8_kernel() -> bool:
    return Action.INT8 in supported_actions(torch.device("cpu"), torch.bfloat16, {(64, 64)})


@dataclass(frozen=True, slots=True)
class Dense(Compensation):
    """`hidden + map · hidden + offset`, with a `[num_layers, hidden_size, hidden_size]` map."""

    maps: Tensor
    offsets: Tensor
    kind = CompensationKind.DENSE

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden + torch.nn.functional.linear(hidden, self.maps[layer], self.offsets[layer])


_CLASSES: dict[CompensationKind, Callable[..., Compensation]] = {
    CompensationKind.IDENTITY: Identity,
    CompensationKind.SCALE: Scale,
    CompensationKind.AFFINE: Affine,
    CompensationKind.LOW_RANK: LowRank,
    CompensationKind.DENSE: Dense,
}


def make_compensation(kind: str, tensors: dict[str, Tensor], num_layers: int, hidden_size: int) -> Compensation:
    """Returns the compensation whose `tensors()` these are.

    Raises:
        PolicyFileError: the kind is unknown, or a tensor is missing or has the wrong shape.
    """
    try:
        rung = _CLASSES[CompensationKind(kind)]
    except ValueError:
        known = ", ".join(CompensationKind)
        raise PolicyFileError(f"compensation {kind!r} is unknown; known: {known}") from None
    try:
        compensation = rung(**tensors)
    except TypeError:
        raise PolicyFileError(f"compensation {kind!r} does not take {sorted(tensors)}") from None
    rank = tensors["down"].shape[:2][-1] if "down" in tensors else 0
    shapes = {
        (CompensationKind.SCALE, "factors"): (num_layers,),
        (CompensationKind.LOW_RANK, "down"): (num_layers, rank, hidden_size),
        (CompensationKind.LOW_RANK, "up"): (num_layers, hidden_size, rank),
        (CompensationKind.DENSE, "maps"): (num_layers, hidden_size, hidden_size),
    }
    for name, tensor in tensors.items():
        expected = shapes.get((compensation.kind, name), (num_layers, hidden_size))
        if tuple(tensor.shape) != expected:
            raise PolicyFileError(f"compensation tensor {name!r} has shape {tuple(tensor.shape)}, not {expected}")
    return compensation
