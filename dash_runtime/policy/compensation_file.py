"""Stores compensation: within a policy file, or in a file of its own that `dash-policy fit` writes for `train`.

Low-rank maps are stored packed. Knows one rung of the ladder and its model; knows no policies.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.errors import PolicyFileError
from dash_runtime.files.tensor_file import load_tensors, naming, save_tensors
from dash_runtime.files.wording import quoted
from dash_runtime.layers.compensation import (
    Compensation,
    CompensationKind,
    LowRank,
    PackedLowRank,
    make_compensation,
    packed,
)
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.model_sketch import is_same_model

_FORMAT = "dash-compensation-1"
_WHAT = "compensation file"


def stored(compensation: Compensation) -> dict[str, Tensor]:
    """Returns the tensors to write."""
    if isinstance(compensation, LowRank):
        return PackedLowRank.from_low_rank(compensation, torch.bfloat16).tensors()
    return compensation.tensors()


def restored(
    kind: str, tensors: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Compensation:
    """Returns the compensation that was stored, ready to run on `device` in a decoder of that dtype.

    Raises:
        PolicyFileError: the kind is unknown, or a tensor is missing, of the wrong type or shape, or not finite.
    """
    if kind not in [*CompensationKind]:
        known = ", ".join(CompensationKind)
        raise PolicyFileError(f"compensation {quoted(kind)} is unknown; known: {known}")
    for name, tensor in tensors.items():
        is_packed = kind == CompensationKind.LOW_RANK and tensor.dtype is torch.int8
        if not is_packed and not (tensor.is_floating_point() and tensor.to(dtype).isfinite().all()):
            raise PolicyFileError(f"compensation tensor {quoted(name)} is not finite floating point")
    shape = (config.num_layers, config.hidden_size)
    if kind != CompensationKind.LOW_RANK:
        return make_compensation(kind, {name: t.to(device, dtype) for name, t in tensors.items()}, *shape)
    stored_names = {field.name for field in fields(PackedLowRank) if field.init}
    if set(tensors) != stored_names:
        raise PolicyFileError(f"compensation {kind!r} does not take {quoted(sorted(tensors))}")
    if any((tensor.dtype is torch.int8) != (name in ("down", "up")) for name, tensor in tensors.items()):
        raise PolicyFileError("compensation tensors 'down' and 'up', and no others, must be int8")
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
    save_tensors(path, _WHAT, stored(compensation), metadata)


def load_compensation(
    path: Path, config: ModelConfig, fingerprint: str, *, dtype: torch.dtype, device: torch.device
) -> Compensation:
    """Reads the compensation of the model with this fingerprint.

    Raises:
        PolicyFileError: the message names the file and the fault.
    """
    tensors, metadata = load_tensors(path, _WHAT, ("format", "kind", "model_fingerprint"))
    with naming(path, _WHAT):
        if metadata.get("format") != _FORMAT:
            raise PolicyFileError(f"is not of format {_FORMAT}")
        if not is_same_model(metadata.get("model_fingerprint", ""), fingerprint):
            raise PolicyFileError(f"was made for another model than {config.name}")
        return restored(metadata.get("kind", ""), tensors, config, dtype, device)
