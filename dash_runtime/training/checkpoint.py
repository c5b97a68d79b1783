"""Checkpoints of a training run: network, optimiser and compensation in one safetensors file.

Each is written in one rename, so that a stop or a full disk leaves the last one intact. Knows tensors and files; knows
no text and no rewards.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dash_runtime.errors import PolicyFileError
from dash_runtime.files.tensor_file import load_tensors, save_tensors
from dash_runtime.files.wording import one_line
from dash_runtime.layers.compensation import LowRank
from dash_runtime.training.actor_critic import ActorCritic


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state beside the network and the optimiser: the number of iterations done, and the latest compensation."""

    iteration: int
    compensation: LowRank


def save_checkpoint(
    path: Path, signature: str, model: ActorCritic, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Writes the checkpoint of the run that `signature` names.

    Raises:
        PolicyFileError: it cannot be written; the one before it is intact.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors |= {f"compensation.{name}": tensor for name, tensor in checkpoint.compensation.tensors().items()}
    metadata = {"signature": signature, "iteration": str(checkpoint.iteration)}
    save_tensors(path, "checkpoint", tensors, metadata)


def load_checkpoint(path: Path, signature: str, model: ActorCritic, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Reads a checkpoint of the run that `signature` names into `model` and `optimizer`.

    Raises:
        PolicyFileError: it is of another run, or damaged.
    """
    try:
        tensors, metadata = load_tensors(path, "checkpoint", ("signature", "iteration"))
    except PolicyFileError as error:
        raise PolicyFileError(f"{error}; remove it to start again") from None
    if metadata.get("signature") != signature:
        raise PolicyFileError(f"checkpoint {path} is of another run; remove it, or give another --out")
    try:
        model.load_state_dict(_part(tensors, "model."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer.").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return Checkpoint(int(metadata["iteration"]), LowRank(**_part(tensors, "compensation.")))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise PolicyFileError(f"checkpoint {path} cannot be read ({reason}); remove it to start again") from None


def num_iterations_done(path: Path) -> int:
    """Returns the number of iterations done by the checkpoint's run; 0 if it does not exist or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {}).get("iteration", 0))
    except (SafetensorError, OSError, ValueError):
        return 0


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
