"""PPO (Schulman et al. 2017) over layers: rewards, advantages, and the clipped update.

An episode is one token's way through the layers, undiscounted. Knows rollouts and the network; knows no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.decoder.full_path import full_path
from dash_runtime.errors import DashRuntimeError
from dash_runtime.rollout.rollout import Judged, Rollout, costs_by_action, divergences
from dash_runtime.rollout.task import Outcome, Task, outcome_of
from dash_runtime.training.actor_critic import ActorCritic


class TrainingDiverged(DashRuntimeError):
    """A loss is not a number; the last checkpoint is intact."""


class Objective(StrEnum):
    """The loss of a token that leaves full depth: its divergence, or, for a drafter, the probability that full depth
    rejects it."""

    DIVERGENCE = "divergence"
    ACCEPTANCE = "acceptance"

    def loss(self, judged: Judged) -> Tensor:
        """Returns the loss of each row."""
        return judged.divergence if self is Objective.DIVERGENCE else 1 - judged.acceptance


@dataclass(frozen=True, slots=True)
class PpoSettings:
    """Settings of the update; `price_range` bounds λ, the price of a whole token's cost, and `shaping` is w."""

    objective: Objective = Objective.DIVERGENCE
    price_range: tuple[float, float] = (0.1, 4.0)
    divergence_limit: float = 4.0
    shaping: float = 0.1
    gae_lambda: float = 0.95
    clip: float = 0.2
    epochs: int = 3
    minibatch_rows: int = 448
    entropy_start: float = 0.01
    entropy_floor: float = 0.002
    value_weight: float = 0.5


@dataclass(frozen=True, slots=True)
class Experience:
    """Steps of decided rows at each block, `[num_blocks, rows, …]`."""

    hidden: Tensor
    last_actions: Tensor
    cost_spent: Tensor
    log_price: Tensor
    chosen: Tensor
    """int64 `[num_blocks, rows, block_size]`, indices into the task's actions; 0 beyond a smaller last block."""
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class UpdateLosses:
    """Means over one update."""

    entropy: float
    value_loss: float


def collect(
    task: Task,
    model: ActorCritic,
    sequences: Sequence[Sequence[int]],
    num_paths: int,
    log_price: Tensor,
    settings: PpoSettings,
) -> tuple[Experience, Outcome]:
    """Samples `num_paths` paths for every token at its row's price, and scores them.

    The sequences are all of one length; `log_price` is `[rows]`, for one path.
    """
    full = full_path(task.decoder, sequences)
    rows = task.decided_rows(sequences)
    copies = list(sequences) * num_paths
    log_price = log_price.repeat(num_paths)
    decided = rows.repeat(num_paths)
    network = model.actor.view()
    observed: list[tuple[Tensor, ...]] = []
    numbers = torch.tensor([int(action) for action in task.spec.actions])
    places = {block: index for index, block in enumerate(task.spec.decision_blocks)}

    def choose(block: tuple[int, ...], hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        scores = network.scores(places[block], hidden, last_actions, spent, log_price)
        index = torch.distributions.Categorical(logits=scores).sample()
        observed.append((hidden[decided], last_actions[decided], spent[decided], index[decided]))
        return numbers[index[:, : len(block)]].T

    rollout = task.roll_out(copies, choose)
    hidden, last_actions, spent, chosen = (torch.stack(tensors) for tensors in zip(*observed, strict=True))
    judged = divergences(task.decoder, full[-1][rows], rollout.states[-1][decided], task.spec.head)
    prices = log_price[decided].expand(len(hidden), -1)
    valid = _valid_layers(task)
    chosen = chosen * valid.long().unsqueeze(1)
    with torch.no_grad():
        scores, values = model(hidden, last_actions, spent, prices)
    log_probs = _joint_log_probs(torch.log_softmax(scores, dim=-1), chosen, valid)
    rewards = _rewards(task, full, rollout, rows, num_paths, prices[0].exp(), settings.objective.loss(judged), settings)
    advantages = _advantages(rewards, values, settings.gae_lambda)
    experience = Experience(
        hidden, last_actions, spent, prices, chosen, log_probs, advantages, returns=advantages + values
    )
    cost = task.token_costs(rollout, task.spec.num_evaluations)[decided].mean()
    return experience, outcome_of(judged, cost)


def scheduled(start: float, end: float, share: float) -> float:
    """Interpolates linearly from `start` to `end`."""
    return start + share * (end - start)


def _valid_layers(task: Task) -> Tensor:
    """Returns bool `[num_blocks, block_size]`: False beyond the layers of a smaller last block."""
    sizes = torch.tensor([len(block) for block in task.spec.decision_blocks])
    return torch.arange(task.spec.block_size) < sizes.unsqueeze(1)


def _joint_log_probs(log_probs: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
    """Returns the log probability of each block's chosen actions together, `[num_blocks, rows]`."""
    taken = log_probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return (taken * valid.unsqueeze(1)).sum(-1)


def _rewards(
    task: Task,
    full: list[Tensor],
    rollout: Rollout,
    rows: Tensor,
    num_paths: int,
    price: Tensor,
    loss: Tensor,
    settings: PpoSettings,
) -> Tensor:
    """Returns rewards `[num_blocks, rows]`: −λ·c − w·(D after − D before), and at the last block also −loss.

    D is 1 − cosine to the full path's state. It is a potential that ends at 0 (Ng et al. 1999), so that it guides
    without moving the optimum. The mean loss of the token's own paths is subtracted from the loss: a baseline for the
    token's difficulty, which no decision changes. All is divided by 0.3 + λ, so that prices weigh alike.
    """
    blocks = task.spec.decision_blocks
    decided = rows.repeat(num_paths)
    layer_costs = costs_by_action(task.spec.costs)[rollout.actions[:, decided]]
    distances: list[Tensor] = []
    for block in blocks:
        ours = rollout.states[block[0]][decided].view(num_paths, -1, full[0].shape[-1])
        distances.append(1 - functional.cosine_similarity(full[block[0]][rows].float(), ours.float(), dim=-1).flatten())
    distance = torch.stack([*distances, torch.zeros_like(price)])
    rewards = torch.stack([-price * layer_costs[list(block)].sum(0) for block in blocks])
    rewards -= settings.shaping * distance.diff(dim=0)
    by_path = loss.clamp(max=settings.divergence_limit).view(num_paths, -1)
    rewards[-1] -= (by_path - by_path.mean(dim=0)).flatten() if num_paths > 1 else by_path.flatten()
    return rewards / (0.3 + price)


def _advantages(rewards: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """Returns generalised advantage estimates (Schulman et al. 2016) with γ = 1, `[steps, rows]`."""
    advantages = torch.zeros_like(rewards)
    following_value, following_advantage = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        delta = rewards[step] + following_value - values[step]
        following_advantage = delta + gae_lambda * following_advantage
        advantages[step] = following_advantage
        following_value = values[step]
    return advantages


def update(
    task: Task,
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    entropy_weight: float,
    settings: PpoSettings,
    generator: torch.Generator,
) -> UpdateLosses:
    """Runs a few epochs of clipped policy steps over the experience. A minibatch holds all blocks of some tokens.

    Raises:
        TrainingDiverged: the loss is not finite; the parameters are as before that step.
    """
    advantages = (experience.advantages - experience.advantages.mean()) / (experience.advantages.std() + 1e-6)
    inputs = (experience.hidden, experience.last_actions, experience.cost_spent, experience.log_price)
    valid = _valid_layers(task)
    sums = torch.zeros(2)
    count = 0
    for _ in range(settings.epochs):
        for rows in torch.randperm(advantages.shape[1], generator=generator).split(settings.minibatch_rows):
            scores, values = model(*(tensor[:, rows] for tensor in inputs))
            log_probs = torch.log_softmax(scores, dim=-1)
            taken = _joint_log_probs(log_probs, experience.chosen[:, rows], valid)
            ratio = (taken - experience.log_probs[:, rows]).exp()
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            gain = torch.minimum(ratio * advantages[:, rows], clipped * advantages[:, rows]).mean()
            entropies = -(log_probs.exp() * log_probs).sum(-1) * valid.unsqueeze(1)
            entropy = entropies.sum() / (valid.sum() * len(rows))
            value_loss = functional.mse_loss(values, experience.returns[:, rows])
            # The gain is a block's, so the entropy is that of a block too: its layers' mean times its size.
            loss = settings.value_weight * value_loss - gain - entropy_weight * task.spec.block_size * entropy
            if not loss.isfinite():
                raise TrainingDiverged("the loss is not a number; the last checkpoint is kept")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            sums += torch.stack((entropy.detach(), value_loss.detach()))
            count += 1
    return UpdateLosses(*(sums / count).tolist())
