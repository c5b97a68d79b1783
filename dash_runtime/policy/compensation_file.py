"""How compensation is stored: within a policy file, and on its own as `dash-policy fit` leaves it for `train`.

Low-rank maps are stored packed. Knows one rung and the model that it belongs to; knows no policies.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.decoder.compensation import (
    Compensation,
    CompensationKind,
    LowRank,
    PackedLowRank,
    make_compensation,
    packed,
)
from dash_runtime.errors import PolicyFileError
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.tensor_file import load_tensors, save_tensors

_FORMAT = "dash-compensation-1"


def stored(compensation: Compensation) -> dict[str, Tensor]:
    """The tensors to write."""
    if isinstance(compensation, LowRank):
        return PackedLowRank.from_low_rank(compensation, torch.bfloat16).tensors()
    return compensation.tensors()


def restored(
    kind: str, tensors: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Compensation:
    """The compensation that was stored, ready to run on `device` in a decoder of that dtype.

    Raises:
        PolicyFileError: the kind is unknown, or a tensor is missing, of the wrong type or shape, or not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PolicyFileError(f"compensation tensor {name!r} is not finite")
    shape = (config.num_layers, config.hidden_size)
    if kind != CompensationKind.LOW_RANK:
        return make_compensation(kind, {name: t.to(device, dtype) for name, t in tensors.items()}, *shape)
    stored_names = {field.name for field in fields(PackedLowRank) if field.init}
    if set(tensors) != stored_names:
        raise PolicyFileError(f"compensation {kind!r} does not take {sorted(tensors)}")
    if {tensors[name].dtype for name in ("down", "up")} != {torch.int8}:
        raise PolicyFileError("compensation tensors 'down' and 'up' must be int8")
    for name in ("down", "up"):
        if tensors[f"{name}_scales"].shape != tensors[name].shape[:-1]:
            raise PolicyFileError(f"compensation tensor '{name}_scales' does not fit {name!r}")
    low_rank = PackedLowRank(**tensors).to_low_rank().to(device)
    make_compensation(kind, low_rank.tensors(), *shape)  # for its checks
    return packed(low_rank, dtype)


def save_compensation(path: Path, compensation: Compensation, fingerprint: str) -> None:
    """Writes the file in one rename.

    Raises:
        PolicyFileError: it cannot be written.
    """
    metadata = {"format": _FORMAT, "kind": compensation.kind.value, "model_fingerprint": fingerprint}
    save_tensors(path, "compensation file", stored(compensation), metadata)


def load_compensation(
    path: Path, config: ModelConfig, fingerprint: str, *, dtype: torch.dtype, device: torch.device
) -> Compensation:
    """Reads the compensation of the model with this fingerprint.

    Raises:
        PolicyFileError: naming the file, and what is wrong with it.
    """
    tensors, metadata = load_tensors(path, "compensation file")
    try:
        if metadata.get("format") != _FORMAT:
            raise PolicyFileError(f"is not of format {_FORMAT}")
        if metadata.get("model_fingerprint") != fingerprint:
            raise PolicyFileError(f"was made for another model than {config.name}")
        return restored(metadata.get("kind", ""), tensors, config, dtype, device)
    except PolicyFileError as error:
        raise PolicyFileError(f"compensation file {path} {error}") from None
