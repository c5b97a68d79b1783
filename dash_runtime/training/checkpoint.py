"""Checkpoints of a training run: everything that a resumed run needs, in one safetensors file.

Each is written in one rename, so that a stop or a full disk leaves the last one intact. Knows tensors, optimisers and
files; knows no text.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from dash_runtime.errors import PolicyFileError
from dash_runtime.files.tensor_file import load_tensors, save_tensors
from dash_runtime.files.wording import one_line


class Trainee:
    """A module with its optimiser."""

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        self.module = module
        self.optimizer = optimizer

    def state(self) -> dict[str, Tensor]:
        """Returns all that training changes, by name."""
        moments = self.optimizer.state_dict()["state"]
        own = {f"{number}.{name}": tensor for number, part in moments.items() for name, tensor in part.items()}
        return {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()} | own

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` returned.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another module.
        """
        # Copies: products round differently by where a tensor lies in memory, and a file's tensors lie anywhere.
        own = {name: tensor.clone() for name, tensor in state.items()}
        prefix = "module."
        self.module.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in own.items():
            if not name.startswith(prefix):
                number, what = name.split(".", 1)
                moments.setdefault(int(number), {})[what] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def save_checkpoint(path: Path, signature: str, rounds: int, trainees: Mapping[str, Trainee]) -> None:
    """Writes the checkpoint of the run that `signature` names, after that many rounds.

    Raises:
        PolicyFileError: it cannot be written; the one before it is intact.
    """
    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part, trainee in trainees.items()
        for name, tensor in trainee.state().items()
    }
    save_tensors(path, "checkpoint", tensors, {"signature": signature, "rounds": str(rounds)})


def load_checkpoint(path: Path, signature: str, trainees: Mapping[str, Trainee]) -> int:
    """Reads the checkpoint of the run that `signature` names into the trainees; returns its number of rounds.

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
        for part, trainee in trainees.items():
            prefix = f"{part}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            trainee.load(own)
        return int(metadata["rounds"])
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
