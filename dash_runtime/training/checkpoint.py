"""Checkpoints of a training run: network, compensation and all labels in one safetensors file.

Each is written in one rename, so that a stop or a full disk leaves the last one intact. Knows tensors and files; knows
no text.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dash_runtime.errors import PolicyFileError
from dash_runtime.files.tensor_file import load_tensors, save_tensors
from dash_runtime.files.wording import one_line
from dash_runtime.layers.compensation import LowRank
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.training.labels import Labels, SpoiltContext


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after some rounds. Before the first there are no labels and no network."""

    rounds: int
    network: PolicyNetwork | None
    compensation: LowRank
    spoilt: SpoiltContext
    labels: Labels | None


def save_checkpoint(path: Path, signature: str, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint of the run that `signature` names, after its first round or later.

    Raises:
        PolicyFileError: it cannot be written; the one before it is intact.
    """
    assert checkpoint.network is not None
    assert checkpoint.labels is not None
    parts = {
        "network": _named(checkpoint.network),
        "compensation": checkpoint.compensation.tensors(),
        "spoilt": _named(checkpoint.spoilt),
        "labels": checkpoint.labels.tensors(),
    }
    tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    save_tensors(path, "checkpoint", tensors, {"signature": signature, "rounds": str(checkpoint.rounds)})


def load_checkpoint(path: Path, signature: str) -> Checkpoint:
    """Reads the checkpoint of the run that `signature` names.

    Raises:
        PolicyFileError: it is of another run, or damaged.
    """
    try:
        tensors, metadata = load_tensors(path, "checkpoint", ("signature", "rounds"))
    except PolicyFileError as error:
        raise PolicyFileError(f"{error}; remove it to start again") from None
    if metadata["signature"] != signature:
        raise PolicyFileError(f"checkpoint {path} is of another run; remove it, or give another --out")
    try:
        return Checkpoint(
            int(metadata["rounds"]),
            PolicyNetwork(**_part(tensors, "network.")),
            LowRank(**_part(tensors, "compensation.")),
            SpoiltContext(**_part(tensors, "spoilt.")),
            Labels(**_part(tensors, "labels.")),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise PolicyFileError(f"checkpoint {path} cannot be read ({reason}); remove it to start again") from None


def num_rounds_done(path: Path) -> int:
    """Returns the rounds done by the checkpoint's run; 0 if it does not exist or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {}).get("rounds", 0))
    except (SafetensorError, OSError, ValueError):
        return 0


def _named(part: PolicyNetwork | SpoiltContext) -> dict[str, Tensor]:
    return {field.name: getattr(part, field.name) for field in fields(part)}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    # Copies: products round differently by where a tensor lies in memory, and a file's tensors lie anywhere.
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(prefix)}
