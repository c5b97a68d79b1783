"""Trains a budget-conditioned policy and calibrates its budgets. Resumes where it was stopped, to the same result.

Knows the task and the loop; knows no command line.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dash_runtime.errors import ConfigError, PolicyFileError
from dash_runtime.policy.learned import Calibration, PolicyNetwork
from dash_runtime.training.actor_critic import ActorCritic
from dash_runtime.training.ppo import Outcome, PpoSettings, Task, collect, token_costs, update
from dash_runtime.training.rollout import Choose, divergences, full_path, roll_out

CALIBRATION_PRICES = tuple(0.05 * 2 ** (step / 2) for step in range(18))
"""λ from 0.05 to 18, in steps of √2."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """`sequences_per_iteration` sequences are rolled out and learned from at a time."""

    iterations: int = 240
    sequences_per_iteration: int = 8
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    seed: int = 0
    checkpoint_every: int = 10
    ppo: PpoSettings = field(default_factory=PpoSettings)

    def __post_init__(self) -> None:
        for name in ("iterations", "sequences_per_iteration", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")


Progress = Callable[[int, float, Outcome], None]
"""`(iteration, mean λ, outcome)`."""


def train(
    task: Task,
    sequences: Sequence[Sequence[int]],
    settings: TrainSettings,
    checkpoint: Path,
    progress: Progress,
) -> PolicyNetwork:
    """Trains on `sequences`, all of one length, and returns the network.

    Every `checkpoint_every` iterations the state is kept in `checkpoint`, in one rename; a run that finds it goes on
    from there and ends as it would have without the stop, since each iteration draws from a seed of its own.

    Raises:
        TrainingDiverged: the loss is not a number; the last checkpoint is intact.
        PolicyFileError: the checkpoint is damaged or of another task.
    """
    config = task.decoder.config
    model = ActorCritic(config.num_layers, config.hidden_size, task.actions, settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    signature = json.dumps(
        [asdict(settings), [action.name for action in task.actions], sorted(task.pinned), len(sequences)]
    )
    start = _load(checkpoint, model, optimizer, signature) if checkpoint.exists() else 0
    for iteration in range(start, settings.iterations):
        torch.manual_seed(settings.seed * 1_000_003 + iteration)
        share = iteration / settings.iterations
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate + share * (settings.final_learning_rate - settings.learning_rate)
        picked = torch.randperm(len(sequences))[: settings.sequences_per_iteration].tolist()
        batch = [sequences[index] for index in picked]
        low, high = (math.log(price) for price in settings.ppo.price_range)
        per_sequence = torch.empty(len(batch)).uniform_(low, high)
        log_price = per_sequence.repeat_interleave(torch.tensor([len(ids) for ids in batch]))
        experience, outcome = collect(task, model, batch, log_price, settings.ppo)
        entropy = settings.ppo.entropy_start + share * (settings.ppo.entropy_floor - settings.ppo.entropy_start)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + iteration)
        update(model, optimizer, experience, entropy, settings.ppo, generator)
        progress(iteration, float(per_sequence.exp().mean()), outcome)
        if (iteration + 1) % settings.checkpoint_every == 0 or iteration + 1 == settings.iterations:
            _save(checkpoint, model, optimizer, signature, iteration + 1)
    return model.network()


@torch.no_grad()
def greedy_outcome(
    task: Task, network: PolicyNetwork, sequences: Sequence[Sequence[int]], price: float
) -> tuple[Outcome, Tensor]:
    """What the policy does when it always takes its best action, and its actions `[num_layers, decided rows]`."""
    numbers = torch.tensor([int(action) for action in task.actions])
    log_price = math.log(price)

    def choose(layer: int, hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        scores = network.scores(hidden, layer, last_actions, spent, torch.full((len(hidden),), log_price))
        return numbers[scores.argmax(dim=-1)]

    return path_outcome(task, sequences, choose)


@torch.no_grad()
def path_outcome(
    task: Task,
    sequences: Sequence[Sequence[int]],
    choose: Choose,
    full: list[Tensor] | None = None,
) -> tuple[Outcome, Tensor]:
    """Cost, divergence and agreement of the paths that `choose` takes, and its actions `[num_layers, decided rows]`.

    `full` is the full path of the same sequences, where the caller has it already.
    """
    rows = task.decided_rows(sequences)
    full = full or full_path(task.decoder, sequences)
    rollout = roll_out(
        task.decoder, sequences, rows, task.pinned, task.lookahead, task.compensation, task.costs, choose
    )
    kl, agree = divergences(task.decoder, full[-1][rows], rollout.states[-1][rows], task.head)
    cost = token_costs(task, rollout)[rows].mean()
    return Outcome(float(cost), float(kl.mean()), float(agree.float().mean())), rollout.actions[:, rows]


def calibrate(task: Task, network: PolicyNetwork, sequences: Sequence[Sequence[int]]) -> Calibration:
    """Finds, for a ladder of prices, the mean cost that the policy keeps on `sequences`."""
    costs = [(greedy_outcome(task, network, sequences, price)[0].cost, math.log(price)) for price in CALIBRATION_PRICES]
    points: list[tuple[float, float]] = []
    for cost, log_price in sorted(costs, key=lambda point: point[1], reverse=True):
        # A dearer price never costs more, or it is left out: the cheaper of the two serves that budget.
        if not points or cost > points[-1][0]:
            points.append((min(cost, 1.0), log_price))
    return Calibration(tuple(points))


def _save(path: Path, model: ActorCritic, optimizer: torch.optim.Optimizer, signature: str, iteration: int) -> None:
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        metadata = {"signature": signature, "iteration": str(iteration)}
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path, model: ActorCritic, optimizer: torch.optim.Optimizer, signature: str) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("signature") != signature:
                raise PolicyFileError(f"checkpoint {path} is of another run; remove it, or give another --out")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model.load_state_dict(
            {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return int(metadata["iteration"])
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise PolicyFileError(f"checkpoint {path} cannot be read ({error}); remove it to start again") from None
